"""One array as one .npy file: written with its checksum, read from .npy or .npy.zst, never unpickled."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from squish_nf4.checkpoint.lossless import Array


@dataclass(frozen=True)
class StoredFile:
    """A file that was written: its name, size, and the sha256 of its bytes in hex."""

    name: str
    nbytes: int
    sha256: str


class HashingFile:
    """The write side of a file that hashes what passes, so that no byte is read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def write_npy(path: Path, array: Array) -> StoredFile:
    """Writes a new file and waits until the disk has it; FileExistsError rather than an overwrite."""
    with path.open("xb") as file:
        hashing = HashingFile(file)
        np.lib.format.write_array(hashing, np.asarray(array, order="C"), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        return StoredFile(path.name, file.tell(), hashing.sha256.hexdigest())


def find_npy(folder: Path, stem: str) -> Path | None:
    """folder/stem.npy or folder/stem.npy.zst, or None; both together are refused, for they may differ."""
    places = (folder / f"{stem}.npy", folder / f"{stem}.npy.zst")
    found = [path for path in places if os.path.isfile(path)]  # unlike Path.is_file, False for a name too long to exist
    if len(found) > 1:
        raise ValueError(f"{found[0]} is there twice, plain and as .zst; remove one of them")
    return found[0] if found else None


def read_npy(path: Path) -> Array:
    """The array in a .npy or .npy.zst file, in native byte order. ValueError names a file that is damaged."""
    try:
        if path.suffix == ".zst":
            array = read_zst(path)
        else:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except ImportError:
        raise
    except Exception as error:  # numpy and zstandard raise many kinds for one cause: these bytes are no array
        raise ValueError(f"{path} cannot be read: {error}") from error
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{path} holds {array.dtype}, which is no number type")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_zst(path: Path) -> Array:
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{path} is compressed; to read it, type: pip install zstandard") from None
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        return array
