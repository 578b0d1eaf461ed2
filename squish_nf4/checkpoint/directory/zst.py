"""What a .zst file holds, a bounded piece at a time: a small file may claim to be a very large one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

PIECE = 4096  # compressed bytes a step: 4 of them can stand for 128 KiB, so that no step yields more than 128 MiB
LARGEST_WINDOW = 2**27  # bytes; what the decompressor may allocate for one frame, and zstd's own default


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
    while piece := file.read(PIECE):
        while piece:
            begun = True
            try:
                data = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise ValueError(f"is damaged: {error}") from error
            if data:
                yield data
            piece = b""
            if frame.eof:
                piece, frame, begun = frame.unused_data, decompressor.decompressobj(), False
    if begun:
        raise ValueError("is cut off: its last frame has no end")


class ZstStream:
    """The same, to read from."""

    def __init__(self, file: BinaryIO) -> None:
        self.pieces = decompressed(file)
        self.rest = memoryview(b"")

    def read(self, n: int) -> bytes:
        """n bytes, fewer only at the end."""
        parts = []
        while n and (part := self.read_some(n)):
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def read_some(self, most: int) -> memoryview:
        """One to most bytes, whatever is at hand; none only at the end."""
        if not self.rest:
            self.rest = memoryview(next(self.pieces, b""))
        part, self.rest = self.rest[:most], self.rest[most:]
        return part
