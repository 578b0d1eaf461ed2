"""The journal of an unfinished conversion: JSON lines, each on the disk before what it speaks of gets its name.

The first line is the header: what is converted and how. A source that is the same by sizes, times and headers is taken
for the same; its weights are not all read for that. Then come facts, such as {"tensor": ..., "record": ...}. A line
that was cut short by a crash never was. A journal has one writer at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from squish_nf4._version import __version__
from squish_nf4.checkpoint.conversion.options import ConvertOptions
from squish_nf4.checkpoint.directory.format import DRAFT, READY, TENSORS
from squish_nf4.checkpoint.files import parse_json, sync
from squish_nf4.checkpoint.source.shard_file import Shard
from squish_nf4.checkpoint.source.shards import Entry, Source
from squish_nf4.checkpoint.values import dtype_name, dtype_named
from squish_nf4.replace import refuse_to_replace

VERSION = 1  # of the journal
WRITER = f"squish_nf4 {__version__}"

Line = Mapping[str, Any]


class Journal:
    """An open journal. facts holds what stood in it when it was opened, without the header."""

    def __init__(self, path: Path, file: FileIO | None = None) -> None:
        """Opens an existing one. ValueError: it is damaged. BlockingIOError: another process has it open.

        file: the open journal, if it is locked already.
        """
        self.path = path
        self.file = file or opened_alone(path)
        try:
            self.header, *self.facts = self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> list[dict[str, Any]]:
        self.file.seek(0)
        text = self.file.readall()
        whole = text.rfind(b"\n") + 1
        try:
            lines = [parse_json(line) for line in text[:whole].splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({error}); {way_out(self.path)}") from error
        if not lines or not all(isinstance(line, dict) for line in lines):
            raise ValueError(f"{self.path} is not the journal of a conversion; {way_out(self.path)}")
        self.file.truncate(whole)
        self._end_before = self.file.seek(whole)
        return lines

    @staticmethod
    def create(path: Path, make_header: Callable[[], Line]) -> Journal:
        """Begins a new one, in place of one that may be there. The disk may not have its name yet, only what it holds.

        Args:
            make_header: called when nobody else can begin one here; what it raises leaves all as it was.

        Raises:
            BlockingIOError: another process is about to begin one.
            FileExistsError: there is something at path, or at the draft's, that is no regular file.
        """
        draft = path.with_name(DRAFT)
        file = opened_alone(draft, os.O_CREAT)
        try:
            header = json.dumps(make_header()).encode() + b"\n"
            refuse_to_replace(path)
            try:
                file.truncate(0)
                write_all(file, header)
                sync(draft)
                draft.replace(path)
            except OSError as error:
                raise OSError(error.errno, f"{path} cannot be begun: {error.strerror}; nothing was changed") from error
        except BaseException:
            draft.unlink(missing_ok=True)
            file.close()
            raise
        return Journal(path, file)

    def append(self, facts: Iterable[Line]) -> None:
        """Returns when the disk has them. If it cannot take them all, it keeps none."""
        lines = b"".join(json.dumps(fact).encode() + b"\n" for fact in facts)
        self._end_before = self.file.tell()
        try:
            write_all(self.file, lines)
            os.fsync(self.file.fileno())
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Removes what was appended last."""
        self.file.truncate(self._end_before)
        self.file.seek(self._end_before)

    def remove(self) -> None:
        self.path.unlink()
        self.close()

    def close(self) -> None:
        self.file.close()


def way_out(path: Path) -> str:
    """What may be done about a journal that nobody can go on with."""
    if (path.parent / TENSORS / READY).is_file():
        return f"move it away: {path.parent} holds a finished conversion"
    return f"if the source is still whole, remove {path.parent} to convert anew"


def opened_alone(path: Path, more_flags: int = 0) -> FileIO:
    """A file of ours that stays locked until it is closed.

    Raises:
        BlockingIOError: another process has locked it, or moved it away.
        FileExistsError: it is a link, or has another name: what is written to it would change a file elsewhere.
    """
    foreign = FileExistsError(f"{path} is a link to a file or another name of one, or is no file; move it away")
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_NOFOLLOW | more_flags, 0o666), "r+b")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket
            raise foreign from error
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file.fileno())
        if not os.path.samestat(found, path.lstat()):
            raise BlockingIOError
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise foreign
    except (BlockingIOError, FileNotFoundError):
        file.close()
        raise BlockingIOError(errno.EWOULDBLOCK, f"{path.parent} is being written by another conversion") from None
    except BaseException:
        file.close()
        raise
    return file


def write_all(file: FileIO, data: bytes) -> None:
    """Writes all of it: without a buffer one write may take less than it is given."""
    unwritten = memoryview(data)
    while unwritten:
        unwritten = unwritten[file.write(unwritten) :]


# --- its header -------------------------------------------------------------------------------------------------------


def header_of(source: Source, options: ConvertOptions, tied: Mapping[str, str]) -> dict[str, Any]:
    """For recovery.py to compare, all but "tensors" and "tied", which follow from the rest.

    "identities" are compared only before a shard is removed: those of a copy are others.
    """
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
        "identities": {shard.path.name: list(shard.identity) for shard in source.shards if shard.identity},
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
