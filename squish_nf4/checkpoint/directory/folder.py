"""The folder of a squish directory's arrays, listed once: which files a tensor has, and that they are files of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from squish_nf4.checkpoint.directory.npy_reader import NpyFile, open_npy

SUFFIXES = ("__nf4", "__s_nf4", "__shape", "__pt")
ENDS = (".npy", ".npy.zst")


class Folder:
    """tensors/. root: the squish directory, resolved; links may not leave it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = os.path.realpath(path.parent)
        refuse_outside(path, self.root)
        self.names = frozenset(os.listdir(path))

    def find(self, stem: str) -> Path | None:
        """stem.npy or stem.npy.zst, or None; both together are refused, for they may differ."""
        found = [stem + end for end in ENDS if stem + end in self.names]
        if len(found) > 1:
            raise ValueError(f"{self.path / found[0]} is there twice, plain and as .zst; remove one of them")
        return require_file(self.path / found[0], self.root) if found else None

    def open(self, stem: str) -> NpyFile | None:
        path = self.find(stem)
        return open_npy(path) if path else None

    def forms(self, key: str) -> str:
        """The files of this tensor, for a message."""
        return ", ".join(sorted(self.ends.get(key, ()))) or "nothing"

    @cached_property
    def ends(self) -> defaultdict[str, list[str]]:
        """By key, what its files' names end in. A key ends at the last "__": a__b__pt.npy is not of the key a."""
        ends: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names:
            key, mark, end = name.rpartition("__")
            ends[key].append(mark + end)
        return ends

    def unclaimed(self, keys: Iterable[str]) -> list[str]:
        """Files with our suffixes that are of no tensor with one of these keys."""
        ours = tuple(suffix + end for suffix in SUFFIXES for end in ENDS)
        claimed = {key + suffix for key in keys for suffix in ours}
        return sorted(name for name in self.names - claimed if name.endswith(ours))


def require_file(path: Path, root: str) -> Path:
    """path itself, if it is a regular file, or a link to one inside root; its folder is inside already.

    Raises:
        ValueError: it is not.
    """
    if path.is_symlink():
        refuse_outside(path, root)
    if not path.is_file():
        raise ValueError(f"{path} is {'a link to nothing' if path.is_symlink() else 'not a regular file'}")
    return path


def refuse_outside(path: Path, root: str) -> None:
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != root:
        raise ValueError(
            f"{path} is a link out of the directory, to {real}: what is read stays inside {root}; "
            "copy the directory with its links followed (cp -rL), or move what it links to inside"
        )
