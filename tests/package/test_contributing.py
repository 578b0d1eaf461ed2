"""CONTRIBUTING.md says where an operator stands; it is held to the sources here."""

from __future__ import annotations

import re

from tests.support import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE = "linear_nf4"
USERS = ("squish_nf4/__init__.py", "squish_nf4/nn/")  # call the operator or hand it on, and are no place of its own


def places_that_are_listed() -> list[str]:
    section = TEXT.split("## Adding an operator")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def places_that_there_are() -> list[str]:
    files = [*(ROOT / "csrc" / "ops").iterdir(), *(ROOT / "squish_nf4").rglob("*.py")]
    files += (ROOT / "squish_nf4" / "include").rglob("*.h")
    named = [path for path in files if re.search(rf"\b{EXAMPLE}\b", path.read_text())]
    return [name for path in named if not (name := path.relative_to(ROOT).as_posix()).startswith(USERS)]


def test_every_place_of_an_operator_is_listed_and_every_listed_place_is_one() -> None:
    assert sorted(places_that_are_listed()) == sorted(places_that_there_are())


def test_every_make_target_that_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", TEXT)) <= targets
