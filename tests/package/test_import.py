"""Importing squish_nf4: what it loads, and one sentence instead of undefined symbols where something does not fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import squish_nf4
from squish_nf4 import _build_info, _native
from tests.support.processes import run_python

pytestmark = pytest.mark.sweeps  # a fresh Python for nearly every test

PACKAGE = Path(squish_nf4.__file__).parent
REBUILD = "rebuild it for this torch: pip install --no-build-isolation --force-reinstall --no-deps ."


# --- a torch that does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (("2.14.1", None), ("2.14.1", None)),
        (("2.14.1+cpu", None), ("2.14.0+cu130", "13.0")),  # a CPU build runs in any torch of its minor version
        (("2.14.1+cu130", "13.0"), ("2.14.2", "13.2")),
        (("2.14.0a0+git1234", None), ("2.14.1", None)),
    ],
)
def test_a_torch_of_the_same_minor_version_and_cuda_major_fits(
    built: tuple[str, str | None], running: tuple[str, str | None]
) -> None:
    assert _native.misfit(*built, *running) is None


@pytest.mark.parametrize(
    ("built", "running", "sentence"),
    [
        (("2.14.1", None), ("2.13.0", None), "squish_nf4 was built for torch 2.14.1, but torch 2.13.0 is installed"),
        (("2.14.1", None), ("3.14.1", None), "squish_nf4 was built for torch 2.14.1, but torch 3.14.1 is installed"),
        (("2.1.0", None), ("2.10.0", None), "squish_nf4 was built for torch 2.1.0, but torch 2.10.0 is installed"),
        (
            ("2.14.1", "13.0"),
            ("2.14.1", "12.8"),
            "squish_nf4 was built for CUDA 13.0, but this torch is built for CUDA 12.8",
        ),
        (("2.14.1", "13.0"), ("2.14.1", None), "squish_nf4 was built for CUDA 13.0, but this torch is a CPU build"),
    ],
)
def test_another_torch_is_one_sentence_that_says_what_to_do(
    built: tuple[str, str | None], running: tuple[str, str | None], sentence: str
) -> None:
    assert _native.misfit(*built, *running) == f"{sentence}; {REBUILD}"


def copy_of_the_package(folder: Path, build_info: str | None, native: str | None) -> Path:
    """The Python files of squish_nf4 in ``folder``; its native files hold the text ``native``."""
    target = folder / "squish_nf4"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py"))
    if build_info is not None:
        (target / "_build_info.py").write_text(build_info)
    if native is not None:
        for path in PACKAGE.glob("*.so"):
            (target / path.name).write_text(native)
    return folder


def test_a_package_built_for_another_torch_says_so_before_any_native_file_is_touched(tmp_path: Path) -> None:
    info = 'TORCH_VERSION = "1.13.0"\nCUDA_VERSION = None\nTORCH_CUDA = None\nCOMPILER = ""\n'
    folder = copy_of_the_package(tmp_path, info, "not a library")
    last_line = run_python("import squish_nf4", check=False, cwd=folder)
    assert last_line.startswith("ImportError: squish_nf4 was built for torch 1.13.0, but torch ")
    assert last_line.endswith(f" is installed; {REBUILD}")


@pytest.mark.parametrize("build_info", [None, (PACKAGE / "_build_info.py").read_text()], ids=["no build", "no .so"])
def test_a_package_that_was_not_built_says_so(tmp_path: Path, build_info: str | None) -> None:
    folder = copy_of_the_package(tmp_path, build_info, None)
    assert run_python("import squish_nf4", check=False, cwd=folder) == (
        f"ImportError: squish_nf4 in {folder / 'squish_nf4'} has no native library; "
        "build it: pip install --no-build-isolation ."
    )


def test_the_build_information_is_of_the_torch_that_runs() -> None:
    import torch

    assert _build_info.TORCH_VERSION.split(".")[:2] == torch.__version__.split(".")[:2]
    built = _build_info.TORCH_VERSION, _build_info.CUDA_VERSION
    assert _native.misfit(*built, torch.__version__, torch.version.cuda) is None
    assert re.search(r"\d+\.\d+", _build_info.COMPILER)


# --- one copy of the operators per process ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["libsquish_nf4.so", "squish_ops.so", "renamed.so"])
def test_another_copy_of_the_op_library_is_refused_and_does_not_abort(tmp_path: Path, name: str) -> None:
    copy = tmp_path / name
    shutil.copy(squish_nf4.library_path(), copy)
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); import squish_nf4"
    found = copy if "squish" in name else "another file"
    assert run_python(code, copy, check=False) == (
        f"ImportError: another copy of the squish operators is loaded from {found}; use one copy per process"
    )


LOAD_THEN_IMPORT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
import squish_nf4
print(squish_nf4.quantize_nf4(torch.ones(1, 64))[0].shape)
"""


@pytest.mark.parametrize("how", ["the file", "a symbolic link"])
def test_the_same_op_library_may_be_loaded_before_the_package(tmp_path: Path, how: str) -> None:
    path = Path(squish_nf4.library_path())
    if how == "a symbolic link":
        (tmp_path / "link.so").symlink_to(path)
        path = tmp_path / "link.so"
    assert run_python(LOAD_THEN_IMPORT, path) == "torch.Size([1, 32])\n"


WITHOUT_THE_PACKAGE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
packed, scales = torch.ops.squish.quantize_nf4(torch.ones(2, 64))
assert torch.equal(torch.ops.squish.dequantize_nf4(packed, scales), torch.ones(2, 64))
assert torch.equal(torch.ops.squish.linear_nf4(torch.ones(1, 64), packed, scales), torch.full((1, 2), 64.0))
print(sorted(name for name in sys.modules if name.startswith("squish")))
"""


def test_the_op_library_is_enough_without_the_package(tmp_path: Path) -> None:
    path = squish_nf4.library_path()
    assert isinstance(path, str)
    assert Path(path).is_absolute()
    assert run_python(WITHOUT_THE_PACKAGE, path, cwd=tmp_path) == "[]\n"


# --- what importing loads ---------------------------------------------------------------------------------------------

IMPORTED = """
import sys, torch
before = set(sys.modules)
import squish_nf4
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_a_few_small_modules_and_nothing_else() -> None:
    """This is what keeps the import well below 0.2 s over torch's own (benchmarks/ measures it)."""
    loaded = run_python(IMPORTED).split()
    own = {name for name in loaded if name.split(".")[0] == "squish_nf4"}
    assert own == {
        "squish_nf4",
        *(f"squish_nf4.{name}" for name in ("_native", "_version", "_build_info", "_C")),
        *(f"squish_nf4.{name}" for name in ("ops", "layout", "vmap", "flops", "decompositions", "model")),
        *(f"squish_nf4.model.{name}" for name in ("choose", "in_place", "linear_kinds", "quantize", "report")),
        *(f"squish_nf4.model.{name}" for name in ("source_scan", "transformers_models")),
        *(
            f"squish_nf4.model.source_scan.{name}"
            for name in ("class_source", "conditions", "method", "readers", "values")
        ),
        *(
            f"squish_nf4.{name}"
            for name in ("nn", "nn.embedding", "nn.linear", "nn.packed", "nn.packed_weight", "nn.packer")
        ),
    }
    heavy = (
        "numpy",
        "safetensors",
        "typer",
        "rich",
        "zstandard",
        "transformers",
        "matplotlib",
        "torch._dynamo",
        "pytest",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []
    assert len([name for name in loaded if name not in own]) <= 10  # of the standard library and torch


def test_the_converter_is_imported_when_it_is_first_used() -> None:
    code = """
import sys, squish_nf4
assert "squish_nf4.checkpoint.conversion.convert" not in sys.modules
assert callable(squish_nf4.convert) and callable(squish_nf4.quantize_tensor) and callable(squish_nf4.load_npy_dir)
import squish_nf4.checkpoint.conversion.convert as module
assert callable(squish_nf4.convert), "the function, also after the module of that name was imported"
print("squish_nf4.checkpoint.conversion.convert" in sys.modules)
"""
    assert run_python(code) == "True\n"


def test_every_public_name_is_there_and_no_other() -> None:
    assert dir(squish_nf4) == sorted(squish_nf4.__all__)
    for name in squish_nf4.__all__:
        assert getattr(squish_nf4, name) is not None
    with pytest.raises(AttributeError, match="module 'squish_nf4' has no attribute 'quantise_model'"):
        squish_nf4.quantise_model  # noqa: B018
