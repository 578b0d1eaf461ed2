"""A small squish directory as another program writes it, and what can be done to its files."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zstandard

from squish_nf4.checkpoint.directory.npy_header import MAGIC
from tests.support import reference
from tests.support.checkpoint_files import write_foreign_dir

PACKED, SCALES = reference.quantize(np.random.default_rng(5).standard_normal((6, 32), dtype=np.float32), 8)
DECODED = reference.dequantize(PACKED, SCALES, 8).reshape(2, 3, 32)
MANIFEST = {"a.weight": "a__weight", "a.bias": "a__bias", "ids": "ids"}


def write_small_dir(path: Path) -> Path:
    """One tensor in NF4 (group size 8), and kept ones of several kinds; no sidecar."""
    arrays = {
        "a__weight__nf4": PACKED,
        "a__weight__s_nf4": SCALES,
        "a__weight__shape": np.array([2, 3, 32]),
        "a__bias__pt": np.array([1, 2.5, -0.0], dtype=np.float16),
        "a__bias__shape": np.array([3]),
        "ids__pt": np.arange(4).reshape(1, 4),
    }
    return write_foreign_dir(path, arrays, MANIFEST)


def compress(file: Path) -> Path:
    """Replaces NAME.npy by NAME.npy.zst."""
    target = file.with_name(f"{file.name}.zst")
    target.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(file.read_bytes()))
    file.unlink()
    return target


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy file byte by byte, of any header."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    return MAGIC + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def header(descr: str, shape: str) -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def sparse(path: Path, start: bytes, more: int) -> None:
    """A file of start and as many zeros more, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + more)


@contextmanager
def allocating_at_most(n_bytes: int) -> Iterator[None]:
    """What runs inside takes no more memory at any moment; numpy's arrays count, mapped files do not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= n_bytes, f"{peak} bytes"


def replace(stem: str, array: np.ndarray) -> Callable[[Path], None]:
    """Something to do to the folder of the arrays."""
    return lambda folder: np.save(folder / f"{stem}.npy", array)


def remove(stem: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{stem}.npy").unlink()
