"""The output of a conversion while it is being written; recovery.py begins it, resumes it, or begins it anew.

What holds at every moment, whatever ends the process: a file under its final name is whole, is on the disk, and stands
in the journal; every other file of ours is a part file. So nothing is lost that the journal knows, and nothing
is deleted that this tool did not write.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.directory.format import MANIFEST, READY, SIDECAR, STATS, TENSORS
from squish_nf4.checkpoint.directory.npy_writer import TensorFiles
from squish_nf4.checkpoint.directory.tables import write_table
from squish_nf4.checkpoint.files import copy_hashing, is_free, place_empty_file, place_file, removed_on_error, sync

Record = dict[str, Any]


@dataclass
class Output:
    """An open output directory. records: of the tensors that are done, by name; copied: the small files, likewise."""

    path: Path
    journal: Journal
    records: dict[str, Record] = field(default_factory=dict)
    copied: dict[str, Record] = field(default_factory=dict)
    _session: str = field(default_factory=lambda: secrets.token_hex(4))
    _parts: int = 0

    @property
    def folder(self) -> Path:
        return self.path / TENSORS

    def new_files(self, key: str) -> TensorFiles:
        return TensorFiles(key, self.new_part, ultra=self.journal.header["options"]["ultra"])

    def new_part(self) -> Path:
        self._parts += 1
        return self.folder / f".squish_nf4-{self._session}-{self._parts}.part"

    def commit(self, batch: Sequence[tuple[str, Record, TensorFiles]]) -> None:
        """Tensors that are written become part of the output: (name, record, files) each."""
        facts = [{"tensor": name, "parts": files.parts, "record": record} for name, record, files in batch]
        try:
            for _, _, files in batch:
                files.sync()
            sync(self.folder)
            self.journal.append(facts)
        except BaseException:
            for _, _, files in batch:
                files.discard()
            raise
        for name, record, files in batch:
            for final, part in files.parts.items():
                place_file(self.folder / part, self.folder / final)
            self.records[name] = record

    def copy(self, source: Path, place: Path) -> bool:
        """A small file, to its place in the output. False: something else is there, and stays."""
        name, target = place.as_posix(), self.path / place
        if name in self.copied:
            return True
        if not is_free(target, self.path):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with removed_on_error(self.new_part()) as part:
            copy = copy_hashing(source, part)
            sync(part)
            sync(self.folder)
            record = {"bytes": copy.nbytes, "sha256": copy.sha256.hexdigest()}
            self.journal.append([{"copied": name, "parts": {name: part.name}, "record": record}])
        place_file(part, target)
        self.copied[name] = record
        return True

    def finish(self, manifest: Mapping[str, str], stats: Mapping[str, Any], sidecar: Mapping[str, Any]) -> None:
        """Writes the three tables, and last the empty file that says the directory is complete."""
        for name, table in ((MANIFEST, manifest), (STATS, stats), (SIDECAR, sidecar)):
            write_table(self.path / name, table, self.new_part())
        for folder in {self.path, self.folder, *((self.path / place).parent for place in self.copied)}:
            sync(folder)
        place_empty_file(self.folder / READY)
        sync(self.folder)
        self.journal.remove()
        with suppress(OSError):  # all is done: a journal that comes back after a crash is removed by a resume
            sync(self.path)
