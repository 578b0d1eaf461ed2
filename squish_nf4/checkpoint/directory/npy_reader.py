"""One array in a .npy or .npy.zst file: opened by its header, checked against its size, read when it is wanted.

A plain file is mapped: pages come from the disk when they are touched, and what is written to the array stays in
memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from squish_nf4.checkpoint.directory.npy_header import Header, read_header
from squish_nf4.checkpoint.files import Identity, identity_of
from squish_nf4.checkpoint.messages import shown
from squish_nf4.checkpoint.resources import require_memory
from squish_nf4.checkpoint.values import Array

ZSTD_BLOCK, SMALLEST_ZSTD_BLOCK = 2**17, 4  # bytes that one block holds at most, and the fewest that it takes
COMPRESSED_STEP = 4096  # bytes read at once: 4 of them can stand for 128 KiB, so that no step yields more than 128 MiB
LARGEST_WINDOW = 2**27  # bytes; what the decompressor may allocate for one frame, and zstd's own default


@dataclass(frozen=True)
class NpyFile:
    """An array on disk. Its header has been read and agrees with the size of the file; its values have not been."""

    path: Path
    header: Header
    identity: Identity

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The dtype of what load() gives: that of the header, in native byte order."""
        return self.header.dtype.newbyteorder("=")

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.identity[2]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def compressed(self) -> bool:
        return is_zst(self.path)

    def load(self) -> Array:
        """The array, C-contiguous, aligned, writable, in native byte order; mapped where the file allows that.

        Raises:
            ValueError: the file is damaged or has changed, or there is not enough memory.
        """
        with opened(self.path) as file:
            if identity_of(os.fstat(file.fileno())) != self.identity:
                raise ValueError("has changed since it was opened")
            if is_zst(self.path):
                return self.in_native_form(self.decompress(ZstStream(file)))
            if not self.header.size:
                return np.empty(self.shape, self.dtype)
            return self.in_native_form(map_privately(file, self.nbytes)[self.header.start :])

    def decompress(self, stream: ZstStream) -> Array:
        read_header(stream.read)
        require_memory(self.header.nbytes, "decompressed, it")
        raw = np.empty(self.header.nbytes, np.uint8)
        done = 0
        while done < raw.size and (data := stream.read_some(raw.size - done)):
            raw[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
        if done < raw.size:
            raise ValueError(f"declares {self.header}, {raw.size} bytes, and holds {done}")
        if stream.read(1):
            raise ValueError(f"declares {self.header}, {raw.size} bytes, and holds more")
        return raw

    def in_native_form(self, raw: Array) -> Array:
        """The array that these bytes are; a copy only where they are not what torch can use as they lie."""
        aligned = raw.ctypes.data % max(1, self.header.dtype.alignment) == 0
        turned = self.header.fortran and len(self.shape) > 1
        if not aligned or turned or self.header.dtype != self.dtype:
            require_memory(self.header.nbytes, "rearranged, it")
        if not aligned:
            raw = raw.copy()
        array = raw.view(self.header.dtype).reshape(self.shape, order="F" if self.header.fortran else "C")
        return np.asarray(array.astype(self.dtype, copy=False), order="C")


def open_npy(path: Path) -> NpyFile:
    """Reads the header of a .npy or .npy.zst file, and holds it to the file's size.

    Raises:
        ValueError: it is no such file, is cut off or too long, or declares what so few bytes cannot hold.
        ImportError: it is compressed, and zstandard is not installed.
    """
    with opened(path) as file:
        compressed = is_zst(path)
        header = read_header(ZstStream(file).read if compressed else file.read)
        identity = identity_of(os.fstat(file.fileno()))
        size = identity[2]
        wanted = header.start + header.nbytes
        if not compressed and wanted != size:
            raise ValueError(f"declares {header}, which makes a file of {wanted} bytes, and has {size}")
        if wanted > size // SMALLEST_ZSTD_BLOCK * ZSTD_BLOCK:
            raise ValueError(f"declares {header}, {header.nbytes} bytes, more than {size} bytes can be compressed from")
        return NpyFile(path, header, identity)


def map_privately(file: BinaryIO, n_bytes: int) -> Array:
    """The file's bytes, mapped; writes stay in memory. It holds no descriptor, as Python's mmap would for its life: a
    large model has more arrays than a process may have files open."""
    path = f"/dev/fd/{file.fileno()}"  # the file that is open, whatever has its name by now
    try:
        return torch.from_file(path, shared=False, size=n_bytes, dtype=torch.uint8, device="cpu").numpy()
    except RuntimeError as error:  # torch's word for what the system refuses
        raise OSError(str(error)) from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file to read from; whatever goes wrong names it."""
    try:
        with path.open("rb") as file:
            yield file
    except ImportError as error:
        raise ImportError(f"{shown(path)} {error}") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from error
    except (OSError, MemoryError) as error:
        raise ValueError(f"{shown(path)} cannot be read: {error}") from error


def is_zst(path: Path) -> bool:
    return path.suffix == ".zst"


def decompressed(file: BinaryIO) -> Iterator[bytes]:
    """The content of the Zstandard frames in file, front to back.

    Raises:
        ImportError: zstandard is not installed.
        ValueError: these are no frames, a checksum is wrong, or the last frame is cut off.
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError("is compressed; to read it, type: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame = decompressor.decompressobj()
    begun = False
    while taken := file.read(COMPRESSED_STEP):
        while taken:
            begun = True
            try:
                data = frame.decompress(taken)
            except zstandard.ZstdError as error:
                raise ValueError(f"is damaged: {error}") from error
            if data:
                yield data
            taken = b""
            if frame.eof:
                taken, frame, begun = frame.unused_data, decompressor.decompressobj(), False
    if begun:
        raise ValueError("is cut off: its last frame has no end")


class ZstStream:
    """The content of a .zst file, read a bounded step at a time: a small file may claim to be a very large one."""

    def __init__(self, file: BinaryIO) -> None:
        self.contents = decompressed(file)
        self.rest = memoryview(b"")

    def read(self, n: int) -> bytes:
        """n bytes, fewer only at the end."""
        data = bytearray()
        while len(data) < n and (some := self.read_some(n - len(data))):
            data += some
        return bytes(data)

    def read_some(self, most: int) -> memoryview:
        """One to most bytes, whatever is at hand; none only at the end."""
        if not self.rest:
            self.rest = memoryview(next(self.contents, b""))
        some, self.rest = self.rest[:most], self.rest[most:]
        return some
