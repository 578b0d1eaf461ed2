"""The table of csrc/nf4/codebook.h is the only one: no file retypes a level, a boundary or the order of nibbles."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from squish_nf4 import _C
from tests.support import ROOT, reference
from tests.support.compiling import code_without_comments
from tests.support.helpers import require
from tests.support.processes import run

CODEBOOK = "csrc/nf4/codebook.h"
ORACLES = {
    "squish_nf4/doctor/self_test.py"
}  # states the nibble order once more on purpose: the library is compared with it


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
    numbers = [*inner_levels, *_C.boundaries()]
    return [spelling for value in numbers for spelling in spellings(value) if spelling in text]


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


def nibble_arithmetic(code: str) -> list[str]:
    return [match.group(0) for match in NIBBLE.finditer(code)]


def test_order_of_the_nibbles_is_written_in_the_codebook_alone() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    sources += (ROOT / "squish_nf4").rglob("*.py")
    names = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {CODEBOOK, "csrc/nf4/codec.h", "csrc/cpu/avx512_codec.cpp", "squish_nf4/ops.py"} <= names
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
