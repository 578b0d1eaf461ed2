"""The squish directory on disk: what its files are called, its state, its tables. See docs/checkpoints.md.

What becomes of a tensor's values is decided elsewhere (encode.py); output.py writes, reader.py reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any

from squish_nf4.checkpoint.conversion.journal import DRAFT, JOURNAL, sync

MANIFEST = "manifest.json"
STATS = "stats.json"
SIDECAR = "squish_nf4.json"
TENSORS = "tensors"
READY = ".manifest_ready"
RESERVED = (MANIFEST, STATS, SIDECAR, JOURNAL, DRAFT, TENSORS)


class State(Enum):
    NEW = auto()  # nothing there, or an empty directory
    UNFINISHED = auto()  # with a journal
    FINISHED = auto()
    FOREIGN = auto()


def state_of(path: Path) -> State:
    """FileExistsError: path is something else than a directory."""
    if path.is_dir():
        if (path / JOURNAL).is_file():
            return State.UNFINISHED
        if (path / TENSORS / READY).exists():
            return State.FINISHED
        return State.FOREIGN if any(file.name != DRAFT for file in path.iterdir()) else State.NEW
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a directory")
    return State.NEW


def write_table(file: Path, table: Mapping[str, Any], draft: Path) -> None:
    """A JSON object in ASCII, whole or not at all: until it is, it is called draft."""
    with draft.open("w", encoding="ascii") as writer:  # piece by piece: as one text it would be larger than the table
        writer.writelines(json.JSONEncoder(indent=2, ensure_ascii=True, allow_nan=False).iterencode(table))
    sync(draft)
    draft.replace(file)
