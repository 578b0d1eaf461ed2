"""One safetensors file: opened, told from another that took its place, and what is said if it cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from squish_nf4.checkpoint.files import Identity, identity_of, require_there, sha256_of_bytes, unreadable
from squish_nf4.checkpoint.messages import shown


@dataclass(frozen=True)
class Shard:
    """A safetensors file, and what tells it from a changed one.

    identity: what no other file shares that took its place, nor this one after it was written to; None of a shard that
    is recalled.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    header_sha256: str
    identity: Identity | None = None

    def has_changed(self, status: os.stat_result) -> bool:
        """Whether what has this status now is another file than the one whose header was read, or was written to."""
        return identity_of(status) != self.identity


def describe(path: Path) -> tuple[Shard, int]:
    """The shard, and where in it the first tensor begins: after the header and the eight bytes that give its length."""
    with opened(path) as file:
        status = os.fstat(file.fileno())
        header = file.read(min(int.from_bytes(file.read(8), "little"), status.st_size))
        digest = sha256_of_bytes(header)
        return Shard(path, status.st_size, status.st_mtime_ns, digest, identity_of(status)), file.tell()


def require_regular(shard: Path) -> None:
    require_there(shard)
    if not shard.is_file():
        raise ValueError(f"{shown(shard)} is no regular file; a shard is one, or a link to one")


@contextmanager
def opened_shard(shard: Path) -> Iterator[Any]:
    """safe_open, with errors that name the file and the usual cause."""
    require_regular(shard)
    try:
        with opened_by_safetensors(shard) as file:
            yield file
    except SafetensorError as error:
        with shard.open("rb") as file:
            is_pointer = file.read(30).startswith(b"version https://git-lfs")
        cause = "a Git LFS pointer; fetch the weights with: git lfs pull" if is_pointer else f"damaged: {error}"
        raise ValueError(f"{shown(shard)} is {cause}") from error


def opened_by_safetensors(shard: Path) -> Any:
    """safetensors calls every file missing that it cannot open; here the system says why."""
    opened(shard).close()
    try:
        return safe_open(shard, framework="pt")
    except OSError as error:
        raise unreadable(shard, error) from error


def opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise unreadable(file, error) from error
