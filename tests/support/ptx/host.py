"""The launchers of csrc/cuda, called as they are: their launches are executed here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import ROOT
from tests.support.processes import run
from tests.support.ptx.machine import Costs, Kernel, launch
from tests.support.ptx.memory import Buffer, KernelError, Memory
from tests.support.ptx.parser import Instruction, Module, parse

EXACT = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-ftz=false", "-prec-div=true")  # as setup.py
NO_WARNING = ("-Werror", "all-warnings")
LIBRARY = "kernels.so"
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)


def compile_kernels(nvcc: str, folder: Path, capability: int = 90) -> Path:
    """A library with the launchers of csrc/cuda, and beside it the PTX of every source."""
    cuda = ROOT / "csrc" / "cuda"
    sources = [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), ROOT / "tests" / "native" / "cuda_host.cpp"]
    flags = [*EXACT, *NO_WARNING, f"-arch=compute_{capability}", f"-I{ROOT}", "-Xcompiler=-fPIC"]
    compilers = [
        subprocess.Popen(
            # What is kept is the PTX, among others: from the same run, for its names are of that run.
            [nvcc, *flags, "--keep", f"--keep-dir={folder}", "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sources
    ]
    for compiler in compilers:
        said, _ = compiler.communicate()
        if compiler.returncode != 0:
            raise RuntimeError(f"nvcc does not compile a kernel:\n{said}")
    library = folder / LIBRARY
    # A real CUDA runtime may be in the process, too; the launchers are to find the one they are linked with.
    done = run(["c++", "-shared", "-Wl,-Bsymbolic", *sorted(folder.glob("*.o")), "-o", library])
    if done.returncode != 0:
        raise RuntimeError(f"the kernels' launchers do not link:\n{done.stderr}")
    return library


def compile_mutant(nvcc: str, source: Path, folder: Path, library: Path, capability: int = 90) -> Path:
    """A copy of ``library``, beside it the PTX of all its sources but one, and of ``source`` in that one's place."""
    for path in library.parent.glob("*.ptx"):
        if path.stem != source.stem:
            (folder / path.name).symlink_to(path)
    mutant = folder / f"{source.stem}.ptx"
    done = run([nvcc, *EXACT, f"-arch=compute_{capability}", f"-I{ROOT}", "-ptx", source, "-o", mutant])
    if done.returncode != 0:
        raise RuntimeError(f"nvcc does not compile a mutant:\n{done.stdout}{done.stderr}")
    # The names that the launchers know: those of the run that compiled them.
    known, found = (name_of_run(path.read_text()) for path in (library.parent / mutant.name, mutant))
    mutant.write_text(mutant.read_text().replace(found, known))
    return Path(shutil.copy(library, folder))


def name_of_run(ptx: str) -> str:
    """The part of every kernel's name that stands for the unnamed namespace of this file, with its length before it."""
    match = re.search(r"(\d+)(_GLOBAL__N__)", ptx)
    assert match is not None
    return ptx[match.start() : match.start(2) + int(match[1])]


@cache
def module_of(path: Path) -> Module:
    return parse(path.read_text())


class Gpu:
    """Stands for a GPU: memory, and the launchers of a library that compile_kernels() made.

    costs: where to add up what the kernels ask of memory, or None.
    """

    def __init__(self, library: Path, capability: int = 90, multiprocessors: int = 132) -> None:
        self._library = ctypes.CDLL(str(library))
        self._kernels: dict[str, Kernel] = {}
        self._modules = [module_of(path.resolve()) for path in sorted(library.parent.glob("*.ptx"))]
        self._callback = LAUNCH(self._launch)  # kept, for C calls it
        self._fault: BaseException | None = None
        self._library.test_setup(self._callback, capability, multiprocessors)
        self.costs: Costs | None = None
        self.only: Callable[[int], Sequence[int]] | None = None  # which blocks to run, of so many
        self.launched: list[str] = []  # the kernels' names since reset()
        self.reset()

    def reset(self) -> Memory:
        """Forgets all buffers; returns the memory that is to hold the next."""
        self.memory = Memory()
        self.launched = []
        self._addresses = [self._place(module) for module in self._modules]
        return self.memory

    def _place(self, module: Module) -> dict[str, int]:
        """The constants of a module, at the same addresses after every reset."""
        images = {v.name: np.frombuffer(v.image.ljust(v.size, b"\0"), np.uint8) for v in module.variables if v.size}
        return {name: self.memory.upload(image).address for name, image in images.items()}

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            for module, addresses in zip(self._modules, self._addresses, strict=True):
                if name in module.functions:
                    self._kernels[name] = Kernel(module, module.functions[name], addresses)
        return self._kernels[name]

    def entries(self) -> list[str]:
        return [name for module in self._modules for name, function in module.functions.items() if not function.results]

    def instructions(self) -> set[str]:
        """The names of all instructions of all kernels."""
        bodies = [function.body for module in self._modules for function in module.functions.values()]
        return {item.name for body in bodies for item in body if isinstance(item, Instruction)}

    def call(self, name: str, *arguments: int | Buffer | None) -> None:
        """A launcher of cuda_host.cpp. KernelError if a kernel did what it must not."""
        self._fault = None
        error = self._library[name](*values_of(arguments))
        if self._fault is not None:
            raise self._fault
        if error:
            raise KernelError(f"{name}: the launch failed with CUDA error {error}")

    def ask(self, name: str, *arguments: int | Buffer | None) -> int:
        """What one of the functions that launch nothing returns."""
        function = self._library[name]
        function.restype = ctypes.c_int64
        return int(function(*values_of(arguments)))

    def _launch(self, name: bytes, sizes: Any, arguments: Any, shared: int) -> int:
        try:
            kernel = self.kernel(name.decode())
            self.launched.append(kernel.name)
            data = {
                parameter.name: ctypes.string_at(arguments[k], parameter.size)
                for k, parameter in enumerate(kernel.parameters)
            }
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            only = None if self.only is None else self.only(grid[0] * grid[1] * grid[2])
            launch(kernel, self.memory, grid, block, data, dynamic_shared=shared, costs=self.costs, only=only)  # type: ignore[arg-type]
        except BaseException as error:  # C cannot pass it on
            self._fault = error
            return 1
        return 0


def values_of(arguments: Sequence[int | Buffer | None]) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(part.address if isinstance(part, Buffer) else part or 0) for part in arguments]
