"""Loads the native library, after making sure that it fits the torch that is running.

A C++ extension loaded into another torch than it was compiled for dies of undefined symbols, or worse, does not. So
what setup.py wrote down at build time is compared first, and a misfit becomes one sentence that says what to do.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent
_OP_LIBRARY = _PACKAGE / "libsquish_nf4.so"
_REBUILD = "rebuild it for this torch: pip install --no-build-isolation --force-reinstall --no-deps ."


def library_path() -> str:
    """Path of the op library, for ``torch.ops.load_library`` or a C++ program; it holds no Python symbol."""
    return str(_OP_LIBRARY)


def cmake_prefix_path() -> str:
    """What to give CMake as CMAKE_PREFIX_PATH, so that ``find_package(squish_nf4 CONFIG)`` finds us."""
    return str(_PACKAGE / "cmake")


def misfit(built_torch: str, built_cuda: str | None, torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a library built with the first pair cannot run in the second, or None if it can."""
    if built_torch.split(".")[:2] != torch_version.split(".")[:2]:
        return f"squish_nf4 was built for torch {built_torch}, but torch {torch_version} is installed; {_REBUILD}"
    if built_cuda is not None and (torch_cuda is None or built_cuda.split(".")[0] != torch_cuda.split(".")[0]):
        found = f"is built for CUDA {torch_cuda}" if torch_cuda else "is a CPU build"
        return f"squish_nf4 was built for CUDA {built_cuda}, but this torch {found}; {_REBUILD}"
    return None


def _other_copy() -> str | None:
    """Where the operators of this process come from, if not from our library: loading it would abort the process."""
    if not hasattr(torch.ops.squish, "quantize_nf4"):
        return None
    mapped = {f"/{line.partition('/')[2]}" for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    if any(os.path.exists(path) and os.path.samefile(path, _OP_LIBRARY) for path in mapped):
        return None
    return next((path for path in sorted(mapped) if "squish" in Path(path).name), "another file")


def is_starting_the_command() -> bool:
    """Whether the package is being imported by ``squish-nf4`` or ``python -m squish_nf4``, before either can catch."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).name == "squish-nf4" or (program == "-m" and "squish_nf4" in sys.orig_argv)


def load() -> ModuleType:
    """Check, then import ``squish_nf4._C``, which registers the operators.

    Raises:
        ImportError: not built, built for another torch, or another copy of the op library is already loaded.
    """
    unbuilt = f"squish_nf4 in {_PACKAGE} has no native library; build it: pip install --no-build-isolation ."
    try:
        info = import_module("squish_nf4._build_info")
    except ModuleNotFoundError:
        raise ImportError(unbuilt) from None
    if not _OP_LIBRARY.is_file():
        raise ImportError(unbuilt)
    reason = misfit(info.TORCH_VERSION, info.CUDA_VERSION, torch.__version__, torch.version.cuda)
    if reason is not None:
        raise ImportError(reason)
    other = _other_copy()
    if other is not None:
        raise ImportError(f"another copy of the squish operators is loaded from {other}; use one copy per process")
    return import_module("squish_nf4._C")
