"""The table of csrc/nf4/codebook.h: its numbers, the boundaries it derives, and that it is the only one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import squish_nf4
from squish_nf4 import _C
from tests.support import ROOT, reference
from tests.support.cases import ulps_from
from tests.support.helpers import require
from tests.support.processes import run

# fmt: off
BOUNDARIES = [float.fromhex(digits) for digits in [
    "-0x1.b239b2p-1", "-0x1.38a4e2p-1", "-0x1.d709p-2", "-0x1.5bd4eep-2", "-0x1.e079dap-3", "-0x1.1a7178p-3",
    "-0x1.74f0e2p-5", "0x1.45f5fep-5", "0x1.ec90c4p-4", "0x1.a0cfcp-3", "0x1.2b05a8p-2", "0x1.8ea7f2p-2",
    "0x1.00da06p-1", "0x1.491b5ep-1", "0x1.b913b2p-1",
]]
# fmt: on
CODEBOOK = "csrc/nf4/codebook.h"
ORACLES = {
    "squish_nf4/doctor/self_test.py"
}  # states the nibble order once more on purpose: the library is compared with it


def nearest_level(x: np.float32) -> int:
    return int(np.argmin(np.abs(x - reference.LEVELS)))


def test_levels_are_those_of_the_format() -> None:
    assert _C.codebook() == tuple(float(level) for level in reference.LEVELS)


def test_boundaries_are_those_of_the_format() -> None:
    assert _C.boundaries() == tuple(BOUNDARIES)


@pytest.mark.parametrize("k", range(15))
def test_boundary_is_the_last_float_that_is_not_nearer_to_the_level_above(k: int) -> None:
    boundary = _C.boundaries()[k]
    for steps in range(-3, 4):
        assert nearest_level(ulps_from(boundary, steps)) == (k + 1 if steps > 0 else k)


def test_six_boundaries_are_not_the_rounded_midpoints() -> None:
    levels = reference.LEVELS.astype(np.float64)
    midpoints = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    assert [k for k in range(15) if midpoints[k] != np.float32(_C.boundaries()[k])] == [0, 1, 3, 4, 12, 14]


def files_of_the_project() -> list[Path]:
    """Every file that git tracks or would track, and that exists."""
    require("git", shutil.which("git") is not None and (ROOT / ".git").exists(), "this is not a git checkout")
    done = run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"])
    assert done.returncode == 0, done.stderr
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def spellings(value: float) -> list[str]:
    """How someone would retype a float32: six digits of its decimals, of its hex float, its bits; lower case."""
    decimal = re.sub(r"[^0-9]", "", f"{abs(value):.17f}").lstrip("0")[:6]
    return [decimal, float(abs(value)).hex()[4:10], f"{np.float32(abs(value)).view(np.uint32):08x}"]


def places_that_hold_a_digit_of_the_table(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="ignore").lower()
    inner_levels = [float(level) for level in reference.LEVELS if abs(level) not in (0, 1)]
    return [spelling for value in [*inner_levels, *BOUNDARIES] for spelling in spellings(value) if spelling in text]


def test_no_level_and_no_boundary_is_typed_outside_the_codebook() -> None:
    elsewhere = {}
    for path in files_of_the_project():
        name = path.relative_to(ROOT).as_posix()
        if name != CODEBOOK and not name.startswith(("tests/", "docs/")):
            elsewhere[name] = places_that_hold_a_digit_of_the_table(path)
    assert CODEBOOK not in elsewhere
    assert {name: found for name, found in elsewhere.items() if found} == {}


def test_search_for_digits_finds_the_codebook_itself() -> None:
    found = places_that_hold_a_digit_of_the_table(ROOT / CODEBOOK)
    assert found == [spellings(float(level))[0] for level in reference.LEVELS if abs(level) not in (0, 1)]


# A shift by four, a mask of fifteen, a division by sixteen: how code takes a byte apart that does not ask the codebook.
NIBBLE = re.compile(
    r"(<<|>>)=?\s*4\b|[&%]=?\s*(15|16|0x0?f|0xf0|240)u?\b|//\s*16\b|s[lr]\w*_epi\w*\([^;]*,\s*4\)"
    r"|(bitwise_and|__and__)\([^;]*\b(15|0x0?f)\)|(left|right)_?shift\w*\([^;]*\b4\)",
    re.IGNORECASE,
)


def code_without_comments(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return re.sub(r"#[^\n]*", "", re.sub(r'"""(.*?)"""', "", text, flags=re.DOTALL))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def nibble_arithmetic(code: str) -> list[str]:
    return [match.group(0) for match in NIBBLE.finditer(code)]


def test_order_of_the_nibbles_is_written_in_the_codebook_alone() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    sources += (ROOT / "squish_nf4").glob("*.py")
    names = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {CODEBOOK, "csrc/nf4/codec.h", "csrc/cpu/avx512.cpp", "squish_nf4/ops.py"} <= names
    found = {path.relative_to(ROOT).as_posix(): nibble_arithmetic(code_without_comments(path)) for path in sources}
    assert {name: hits for name, hits in found.items() if hits and name not in ORACLES} == {}


# fmt: off
NIBBLES = [
    "byte >> 4", "high<<4 | low", "byte & 15", "byte & 0x0F", "b & 0xF0u", "byte % 16", "byte // 16", "byte &= 15",
    "_mm256_srli_epi16(bytes, 4)", "np.bitwise_and(packed, 15)", "np.right_shift(packed, 4)",
]
# fmt: on


@pytest.mark.parametrize("code", NIBBLES)
def test_search_for_nibbles_finds_them(code: str) -> None:
    assert len(nibble_arithmetic(code)) == 1


def test_row_worked_by_hand_in_the_docs_is_what_the_operator_writes() -> None:
    """The first Python block of docs/format.md, run as it stands there."""
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    assert "assert" in block
    exec(block, {"torch": torch, "squish_nf4": squish_nf4})
