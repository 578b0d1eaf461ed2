"""Whether a squish directory is still the one that was opened: a converter may write another one in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squish_nf4.checkpoint.directory.format import MANIFEST, READY, SIDECAR, TENSORS
from squish_nf4.checkpoint.files import Identity, identity_of

MARKS = (Path(TENSORS, READY), Path(MANIFEST), Path(SIDECAR))  # whoever writes a directory anew writes these anew


class Snapshot:
    """The files by which a finished directory is known, as they were when it was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks = marks_of(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is read inside is of the directory that was opened.

        Raises:
            ValueError: the directory was changed meanwhile, whatever else went wrong because of that.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            self.require_unchanged(error)
            raise
        self.require_unchanged()

    def require_unchanged(self, cause: Exception | None = None) -> None:
        if marks_of(self.path) != self.marks:
            raise ValueError(
                f"{self.path} has changed since it was opened: another program writes to it; read it again when that "
                "has ended"
            ) from cause


def marks_of(path: Path) -> list[Identity | None]:
    return [identity_at(path / mark) for mark in MARKS]


def identity_at(path: Path) -> Identity | None:
    """None: there is nothing that can be looked at."""
    try:
        return identity_of(path.stat())
    except OSError:
        return None
