"""The cmake that pip installed, for the tests that build with it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from tests.helpers import require


def required_cmake() -> Path:
    """Its path; without the package the test is skipped."""
    try:
        files = metadata.files("cmake") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())).resolve() for file in files if file.parts[-2:] == ("bin", "cmake")]
    require("cmake", bool(found), "the package cmake is not installed")
    return found[0]
