"""docs/api.md is what scripts/api_page.py makes of the docstrings, and the docstrings say what a page needs."""

from __future__ import annotations

import dataclasses
import re
import runpy
from typing import Any

import pytest

import squish_nf4
from tests.support import ROOT

API_PAGE = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))
PARTS = [part for parts in API_PAGE["PARTS"].values() for part in parts]
VALUES = [getattr(squish_nf4, name) for name in squish_nf4.__all__ if name not in API_PAGE["CONSTANTS"]] + PARTS


def by_name(value: Any) -> str:
    return str(value.__name__)


def test_the_page_is_what_the_docstrings_say() -> None:
    """After a change of a docstring: make format."""
    assert (ROOT / "docs" / "api.md").read_text() == API_PAGE["page"]()


@pytest.mark.parametrize("value", VALUES, ids=by_name)
def test_a_docstring_begins_with_a_sentence(value: Any) -> None:
    first = API_PAGE["docstring"](value).split("\n", 1)[0]
    assert re.fullmatch(r"([A-Z]|``|[a-z]\w*_\w+,? ).*\.", first), first


@pytest.mark.parametrize("value", [value for value in VALUES if dataclasses.is_dataclass(value)], ids=by_name)
def test_every_field_is_explained(value: Any) -> None:
    explained = re.findall(r"(?m)^    (\w+): .", API_PAGE["docstring"](value).partition("Attributes:\n")[2])
    assert {field.name for field in dataclasses.fields(value)} <= set(explained)
