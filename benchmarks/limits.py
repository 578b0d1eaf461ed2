"""The limit loops of limits.cpp, on tensors: compiled once into build/benchmarks, run on torch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("limits.cpp")
FOLDER = SOURCE.parents[1] / "build" / "benchmarks"
TORCH = Path(torch.__file__).resolve().parent
LEFT_OUT = "the limits of the machine are left out, and with them the goals that name them"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared")


@dataclass(frozen=True)
class Limits:
    library: ctypes.CDLL

    @property
    def isa(self) -> str:
        name: bytes = self.library.squish_limits_isa()
        return name.decode()

    def read(self, packed: Tensor, scales: Tensor) -> None:
        """Both tensors once, in eight streams a thread."""
        self.library.squish_limits_read(*_span(packed), *_span(scales), _threads())

    def store(self, out: Tensor, *, streaming: bool) -> None:
        """Every byte of ``out`` once; ``streaming`` goes past the caches."""
        self.library.squish_limits_write(None, ctypes.c_int64(0), *_span(out), ctypes.c_int64(streaming), _threads())

    def read_and_store(self, source: Tensor, out: Tensor, *, streaming: bool) -> None:
        """``source`` once, and ``out`` once; the larger has a whole multiple of the other's bytes."""
        self.library.squish_limits_write(*_span(source), *_span(out), ctypes.c_int64(streaming), _threads())


@cache
def limits() -> Limits | None:
    """The loops, compiled if need be; None, said once, where they cannot be compiled."""
    compiler = (os.environ.get("CXX") or "c++").split()
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except FileNotFoundError:
        print(f"no C++ compiler ({compiler[0]}): {LEFT_OUT}")
        return None
    except subprocess.CalledProcessError:
        print(f"{compiler[0]} could not compile {SOURCE.name}: {LEFT_OUT}")
        return None
    library.squish_limits_isa.restype = ctypes.c_char_p
    library.squish_limits_read.restype = None
    library.squish_limits_write.restype = None
    return Limits(library)


def _compiled(compiler: list[str]) -> Path:
    words = [*compiler, *FLAGS, f"-isystem{TORCH / 'include'}", str(SOURCE), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((words, torch.__version__)).encode()).hexdigest()[:16]
    target = FOLDER / f"limits-{key}.so"
    if not target.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*words, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    return target


def _span(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes)


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())
