"""One array written as one .npy file, part by part, with its checksum. npy_reader.py reads."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from squish_nf4.checkpoint.values import Array

ZSTD_LEVEL = 6  # docs/checkpoints.md has what others would gain: 1 % of the scales' bytes at a tenth of the speed


@dataclass(frozen=True)
class StoredFile:
    """A file that was written: its name, size, the sha256 of its bytes in hex, and its size before compression."""

    name: str
    nbytes: int
    sha256: str
    plain_nbytes: int

    def record(self) -> dict[str, Any]:
        """As squish_nf4.json holds it."""
        plain = {} if self.plain_nbytes == self.nbytes else {"plain_bytes": self.plain_nbytes}
        return {"bytes": self.nbytes, "sha256": self.sha256, **plain}

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> StoredFile:
        return cls(name, record["bytes"], record["sha256"], record.get("plain_bytes", record["bytes"]))


class HashingFile:
    """The write side of a file that hashes what passes, so that no byte is read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self.file.write(data)


class NpyWriter:
    """Writes name.npy, or name.npy.zst, in C order under another name, until that is given up for the real one.

    Args:
        part: the name until then; FileExistsError if there is such a file.
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
        self.frame = compressor().stream_writer(self.hashing, size=self.plain_nbytes) if compressed else None
        self._write(npy_header(dtype, shape))

    def write(self, values: Array) -> None:
        self._write(np.ascontiguousarray(values).data)

    def _write(self, data: bytes | memoryview) -> None:
        self.unwritten -= memoryview(data).nbytes
        (self.frame or self.hashing).write(data)

    def finish(self) -> StoredFile:
        """All is written, though the disk may not have it yet."""
        assert self.unwritten == 0, f"{self.name} lacks {self.unwritten} bytes"
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
        self.part.unlink()
        with suppress(OSError):  # what is buffered may not fit on the disk
            self.file.close()


def compressor() -> Any:
    """One frame with its size and a checksum. ImportError: zstandard is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ImportError("ultra compresses; for that, type: pip install zstandard") from None
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)


def npy_header(dtype: np.dtype[np.generic], shape: Sequence[int]) -> bytes:
    """What numpy.save writes before the values."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def npy_nbytes(dtype: np.dtype[np.generic], shape: Sequence[int]) -> int:
    """The size of a .npy file."""
    return len(npy_header(dtype, shape)) + int(np.prod(shape, dtype=object)) * dtype.itemsize
