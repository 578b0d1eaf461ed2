"""Builds C++ programs on the op library, in the two ways of docs/native/cpp.md."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch

from tests.support.helpers import require
from tests.support.processes import run

TORCH = Path(torch.__file__).resolve().parent


def required_cmake() -> Path:
    """The one that pip installed; without it the test is skipped."""
    try:
        files = metadata.files("cmake") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())).resolve() for file in files if file.parts[-2:] == ("bin", "cmake")]
    require("cmake", bool(found), "the package cmake is not installed")
    return found[0]


def build_with_cmake(source: Path, app: Path, package: Path) -> None:
    (source.parent / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject({app.name} CXX)\nfind_package(squish_nf4 CONFIG REQUIRED)\n"
        f"add_executable({app.name} {source.name})\n"
        f"target_link_libraries({app.name} PRIVATE squish_nf4::squish_nf4)\n"
    )
    cmake = required_cmake()
    options = [f"-DCMAKE_PREFIX_PATH={package}/cmake", f"-DSQUISH_NF4_TORCH={TORCH}"]
    for command in ([cmake, "-S", source.parent, "-B", app.parent, *options], [cmake, "--build", app.parent]):
        done = run(command)
        assert done.returncode == 0, done.stdout + done.stderr


def build_without_cmake(source: Path, app: Path, package: Path) -> None:
    command = ["c++", "-std=c++20", source, "-o", app, f"-I{package}/include"]
    command += [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    command += ["-Wl,--no-as-needed", f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    command += ["-lc10_cuda"] if (TORCH / "lib" / "libc10_cuda.so").exists() else []
    command += [f"-L{package}", "-lsquish_nf4", f"-Wl,-rpath,{package}:{TORCH}/lib", "-Wl,--allow-shlib-undefined"]
    done = run(command)
    assert done.returncode == 0, done.stderr
