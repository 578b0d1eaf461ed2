"""The arrays of a tensor written as .npy files, stretch by stretch, with their checksums. npy_reader.py reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from squish_nf4.checkpoint.directory.npy_header import npy_header, npy_nbytes
from squish_nf4.checkpoint.files import HashingFile
from squish_nf4.checkpoint.values import Array

ZSTD_LEVEL = 6  # docs/convert.md has what others would gain: 1 % of the scales' bytes at a tenth of the speed


@dataclass(frozen=True)
class StoredFile:
    """A file that was written: its name, size, the sha256 of its bytes in hex, and its size before compression."""

    name: str
    nbytes: int
    sha256: str
    plain_nbytes: int

    def record(self) -> dict[str, Any]:
        """The form in which squish_nf4.json holds it."""
        plain = {} if self.plain_nbytes == self.nbytes else {"plain_bytes": self.plain_nbytes}
        return {"bytes": self.nbytes, "sha256": self.sha256, **plain}

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> StoredFile:
        return cls(name, record["bytes"], record["sha256"], record.get("plain_bytes", record["bytes"]))


class NpyWriter:
    """Writes one array as name.npy or name.npy.zst, in C order, into a part file that gets this name later.

    Args:
        part: the part file; FileExistsError if there is one.
        name: of the finished file, without the .zst.
        shape: of the whole array; what is written has to add up to it.
    """

    def __init__(
        self, part: Path, name: str, dtype: np.dtype[np.generic], shape: Sequence[int], *, compressed: bool = False
    ) -> None:
        self.part, self.name = part, f"{name}.zst" if compressed else name
        self.plain_nbytes = self.unwritten = npy_nbytes(dtype, shape)
        self.file = part.open("xb")
        self.hashing = HashingFile(self.file)
        self.frame: Any = None
        try:
            if compressed:
                self.frame = compressor().stream_writer(self.hashing, size=self.plain_nbytes)
            self._write(npy_header(dtype, shape))
        except BaseException:
            self.discard()
            raise

    def write(self, values: Array) -> None:
        self._write(np.ascontiguousarray(values).data)

    def _write(self, data: bytes | memoryview) -> None:
        self.unwritten -= memoryview(data).nbytes
        (self.frame or self.hashing).write(data)

    def finish(self) -> StoredFile:
        """All is written, though the disk may not have it yet. RuntimeError: the values do not add up to the shape."""
        if self.unwritten:
            raise RuntimeError(f"{self.name} lacks {self.unwritten} bytes of what its header declares")
        if self.frame is not None:
            self.frame.flush(1)  # FLUSH_FRAME: its end and checksum
            self.frame = None  # a megabyte and more, and the file stays open until its batch is on the disk
        self.file.flush()
        return StoredFile(self.name, self.file.tell(), self.hashing.sha256.hexdigest(), self.plain_nbytes)

    def sync(self) -> None:
        """Waits until the disk has it."""
        os.fsync(self.file.fileno())
        self.file.close()

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        with suppress(OSError):  # what is buffered may not fit on the disk
            self.file.close()


def compressor() -> Any:
    """What compresses into one frame with its size and a checksum. ImportError: zstandard is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ImportError("ultra compresses; for that, type: pip install zstandard") from None
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)


class TensorFiles:
    """The files of one tensor, by suffix, while they are written: all of them get their names together, or none.

    Args:
        key: what their names begin with.
        new_part: gives the name of a part file that is not there yet.
        ultra: whether what may be compressed is, where that makes it smaller.
    """

    def __init__(self, key: str, new_part: Callable[[], Path], *, ultra: bool = False) -> None:
        self.key, self.new_part, self.ultra = key, new_part, ultra
        self.writers: dict[str, list[NpyWriter]] = {}

    def open(
        self, suffix: str, dtype: np.dtype[np.generic], shape: Sequence[int], *, may_compress: bool = False
    ) -> None:
        """Begins a file. Which of its two forms is smaller shows in the end, so both are written."""
        writers = self.writers[suffix] = []
        for compressed in (False, True) if may_compress and self.ultra else (False,):
            name = f"{self.key}{suffix}.npy"
            writers.append(NpyWriter(self.new_part(), name, dtype, shape, compressed=compressed))

    def write(self, suffix: str, values: Array) -> None:
        """Writes the values that come next, row by row."""
        for writer in self.writers[suffix]:
            writer.write(values)

    def finish(self) -> list[StoredFile]:
        """Ends the files. Of the two forms of a file the smaller stays, the plain one if they are equal."""
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
        """{name when finished: name of its part file}."""
        return {writer.name: writer.part.name for [writer] in self.writers.values()}
