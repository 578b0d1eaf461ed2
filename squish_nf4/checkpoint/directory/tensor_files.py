"""The files of one tensor while they are written: all of them get their names together, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from squish_nf4.checkpoint.directory.npy_writer import NpyWriter, StoredFile
from squish_nf4.checkpoint.values import Array


class TensorFiles:
    """Files of one tensor, by suffix.

    Args:
        key: what their names begin with.
        new_part: gives the name of a temporary file that is not there yet.
        ultra: whether what may be compressed is, where that makes it smaller.
    """

    def __init__(self, key: str, new_part: Callable[[], Path], *, ultra: bool = False) -> None:
        self.key, self.new_part, self.ultra = key, new_part, ultra
        self.writers: dict[str, list[NpyWriter]] = {}

    def open(
        self, suffix: str, dtype: np.dtype[np.generic], shape: Sequence[int], *, may_compress: bool = False
    ) -> None:
        """A file to write. Which of its two forms is smaller shows in the end, so both are written."""
        writers = self.writers[suffix] = []
        for compressed in (False, True) if may_compress and self.ultra else (False,):
            name = f"{self.key}{suffix}.npy"
            writers.append(NpyWriter(self.new_part(), name, dtype, shape, compressed=compressed))

    def write(self, suffix: str, values: Array) -> None:
        """The values that come next, row by row."""
        for writer in self.writers[suffix]:
            writer.write(values)

    def finish(self) -> list[StoredFile]:
        """All is written. Of the two forms of a file the smaller stays, the plain one if they are equal."""
        return [self._finish(writers) for writers in self.writers.values()]

    def _finish(self, writers: list[NpyWriter]) -> StoredFile:
        files = {writer.finish(): writer for writer in writers}
        smallest = min(files, key=lambda file: file.nbytes)
        for file, writer in files.items():
            if file != smallest:
                writer.discard()
        writers[:] = [files[smallest]]
        return smallest

    def sync(self) -> None:
        for [writer] in self.writers.values():
            writer.sync()

    def discard(self) -> None:
        """Takes back what was written."""
        while self.writers:
            for writer in self.writers.popitem()[1]:
                writer.discard()

    @property
    def parts(self) -> dict[str, str]:
        """{name when finished: temporary name}."""
        return {writer.name: writer.part.name for [writer] in self.writers.values()}
