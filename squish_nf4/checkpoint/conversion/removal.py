"""Shards removed once their output is on the disk: --delete-source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import Planned
from squish_nf4.checkpoint.files import sha256_on_disk, sync
from squish_nf4.checkpoint.messages import shorten
from squish_nf4.checkpoint.source.shards import Shard


def refuse_links(shards: Sequence[Shard]) -> None:
    """Removing a link frees nothing, and what it leads to may be used elsewhere."""
    for shard in shards:
        if shard.path.is_symlink():
            raise ValueError(f"delete_source: {shard.path} is a symbolic link; give the files themselves, or keep them")
        if shard.path.exists() and shard.path.stat().st_nlink > 1:
            raise ValueError(f"delete_source: {shard.path} has another name elsewhere (a hard link); keep it")


def refuse_lost(missing: Sequence[Planned]) -> None:
    """Tensors that are to be converted, though their shard was removed when they had been."""
    for planned in missing:
        if not planned.entry.shard.path.exists():
            raise ValueError(
                f"tensor {shorten(planned.entry.name)}: what was made of it is gone, and so is its shard, "
                f"{planned.entry.shard.path}; bring either of them back"
            )


def remove_finished(plan: Sequence[Planned], output: Output) -> None:
    """Removes every shard of which all is in the output, after reading that back from the disk.

    Raises:
        ValueError: a file is not what was written. Nothing is removed then.
    """
    tensors: dict[Shard, list[str]] = {}
    for planned in plan:
        tensors.setdefault(planned.entry.shard, []).append(planned.entry.name)
    for shard, names in tensors.items():
        if all(name in output.records for name in names) and shard.path.exists():
            verify(output.folder, [output.records[name] for name in names])
            output.journal.append([{"removed": shard.path.name}])
            shard.path.unlink()
            sync(shard.path.parent)


def verify(folder: Path, records: Collection[Mapping[str, Any]]) -> None:
    for record in records:
        for name, facts in record["files"].items():
            if sha256_on_disk(folder / name) != facts["sha256"]:
                raise ValueError(f"{folder / name} does not read back as it was written; the source is kept")
