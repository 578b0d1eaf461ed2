"""The tests themselves: which of them may know which, and that every folder of theirs is found."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

TESTS = ROOT / "tests"
LIBRARIES = ("tests.support", "tests.fuzzing")  # what may be imported


def python_files() -> list[Path]:
    return sorted(TESTS.rglob("*.py"))


def modules_of_tests(code: str) -> set[str]:
    """The modules below ``tests`` that code imports; also code in its strings, which runs in a process of its own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "tests." in node.value:
            try:
                found |= modules_of_tests(node.value)
            except SyntaxError:  # not code
                continue
    return {name for name in found if name.split(".")[0] == "tests"}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_from_another_file_of_tests(path: Path) -> None:
    assert {name for name in modules_of_tests(path.read_text()) if not name.startswith(LIBRARIES)} == set()


def test_reader_of_imports_sees_them_in_functions_and_in_the_code_of_a_child() -> None:
    code = "import os, {0}.nn.a\ndef f():\n    from {0}.nn import b\nC = '''\nfrom {0}.nn.c import d\n'''\n"
    assert modules_of_tests(code.format("tests")) == {"tests.nn.a", "tests.nn.b", "tests.nn.c.d"}


def test_every_folder_with_python_files_is_a_package() -> None:
    """Or two files of one name could not be collected together."""
    assert {path.parent for path in python_files() if not (path.parent / "__init__.py").exists()} == set()


def test_every_test_lies_in_a_folder() -> None:
    assert list(TESTS.glob("test_*.py")) == []


SLOW = {
    "builds": re.compile(
        r"import .*\b(compile_objects|link|required_cmake|build_with_cmake|build_without_cmake|cuda_budget)\b"
        r"|executed: ExecutedGpu|kernel_objects: dict"
    ),
    "compiles": re.compile(r"\"inductor\"|inductor: None"),
}


@pytest.mark.parametrize("marker", SLOW)
def test_what_builds_or_compiles_says_so(marker: str) -> None:
    """`make test-fast` leaves it out by that."""
    texts = {path: path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    found = {path for path, text in texts.items() if SLOW[marker].search(text)}
    assert len(found) > 2
    assert {path for path in found if f"pytest.mark.{marker}" not in texts[path]} == set()


def test_what_torchscript_compiles_keeps_its_annotations() -> None:
    assert "\nfrom __future__ import annotations" not in (TESTS / "support" / "models.py").read_text()
