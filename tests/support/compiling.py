"""Compiles the C++ of tests/native together with the kernels of csrc/cpu, without torch and without setup.py."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import run

NATIVE = ROOT / "tests" / "native"
COMPILER = tuple(os.environ.get("CXX", "c++").split())
EXACT = ("-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{ROOT}")  # as setup.py compiles


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def code_without_comments(path: Path) -> str:
    """The code of a C++ or Python file; a docstring is a comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return re.sub(r"#[^\n]*", "", re.sub(r'"""(.*?)"""', "", text, flags=re.DOTALL))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def compile_objects(
    folder: Path, sources: Sequence[Path], flags: Sequence[str], compiler: Sequence[str] = COMPILER
) -> list[Path]:
    """One object per source, two compilers at a time; a source that does not compile fails the test."""

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        done = run([*compiler, *EXACT, *flags, "-c", source, "-o", output])
        if done.returncode != 0:
            pytest.fail(f"{source.relative_to(ROOT)} does not compile:\n{done.stderr}", pytrace=False)
        return output

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(output: Path, objects: Sequence[Path], flags: Sequence[str] = (), compiler: Sequence[str] = COMPILER) -> Path:
    done = run([*compiler, *flags, *objects, "-pthread", "-o", output])
    if done.returncode != 0:
        pytest.fail(f"{output.name} does not link:\n{done.stderr}", pytrace=False)
    return output
