"""What a conversion was begun with, for the header of its journal: the source, the options, the writer.

A source that is the same by sizes, times and headers is taken for the same; its weights are not all read for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squish_nf4._version import __version__
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.options import Options
from squish_nf4.checkpoint.source.shards import Entry, Shard, Source
from squish_nf4.checkpoint.values import dtype_name, dtype_named

VERSION = 1  # of the journal
WRITER = f"squish_nf4 {__version__}"


def header_of(source: Source, options: Options, tied: Mapping[str, str]) -> dict[str, Any]:
    """For recovery.py to compare, all but "tensors" and "tied", which follow from the rest."""
    return {
        "journal": VERSION,
        "writer": WRITER,
        "options": options.as_json(),
        "shards": {
            shard.path.name: {
                "bytes": shard.nbytes,
                "mtime_ns": shard.mtime_ns,
                "header_sha256": shard.header_sha256,
            }
            for shard in source.shards
        },
        "small_files": {place.as_posix(): facts_of(file) for file, place in source.small_files},
        "tensors": {
            entry.name: [entry.shard.path.name, dtype_name(entry.dtype), list(entry.shape), entry.start]
            for entry in source.entries
        },
        "tied": dict(tied),
    }


def facts_of(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def recall_removed(folder: Path, journal: Journal) -> dict[Path, list[Entry]]:
    """The shards that an earlier run removed from folder, with what their headers said."""
    removed: dict[str, list[Entry]] = {fact["removed"]: [] for fact in journal.facts if "removed" in fact}
    for name, (shard, dtype, shape, start) in journal.header["tensors"].items():
        if shard in removed:
            known = journal.header["shards"][shard]
            described = Shard(folder / shard, known["bytes"], known["mtime_ns"], known["header_sha256"])
            removed[shard].append(Entry(name, described, dtype_named(dtype), tuple(shape), start))
    return {folder / shard: entries for shard, entries in removed.items() if not (folder / shard).exists()}
