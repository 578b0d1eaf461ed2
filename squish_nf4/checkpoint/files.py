"""The checksum that squish_nf4.json records of a file."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

CHUNK = 2**20  # bytes read at once


def sha256_of(file: BinaryIO) -> str:
    """In hex, of what is left to read."""
    sha256 = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha256.update(chunk)
    return sha256.hexdigest()
