"""Files handled with care: names that stay inside a directory, JSON, checksums, and what the disk really has.

What holds a file open syncs it itself (os.fsync); everything else about a path is asked here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from squish_nf4.checkpoint.messages import shorten, shown

AT_ONCE = 2**20  # bytes read in one step
LARGEST_TABLE = 2**29  # bytes; a record of squish_nf4.json takes about 700
DEEPEST = 16  # objects and lists inside each other; no table of anybody needs half of that

# Device, inode, size, and in nanoseconds the times of the last change of values and of the last change at all. Who
# writes to a file can set back the first of the times, and not the other.
Identity = tuple[int, int, int, int, int]


def identity_of(status: os.stat_result) -> Identity:
    """What another file of the same name does not share, nor this one after it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def lies_inside(path: Path, root: str | Path) -> bool:
    """Whether path, all links followed, is root or lies in it."""
    root = os.path.realpath(root)
    return os.path.commonpath([os.path.realpath(path), root]) == root


def inside(root: Path, folder: str, name: str) -> Path:
    """root / folder / name, for a name out of a table that is not trusted; the file itself may be a link.

    Raises:
        ValueError: the name is absolute, climbs up, or leads through a link out of root.
    """
    place = PurePosixPath(folder, name)
    if place.is_absolute() or ".." in place.parts or not lies_inside((root / place).parent, root):
        raise ValueError(f"{root} lists a file of its own, {shorten(name)}, that lies outside it")
    return root / place


def require_file(path: Path, root: str) -> Path:
    """path itself, if it is a regular file, or a link to one inside root; its folder is inside already.

    Raises:
        ValueError: it is not.
    """
    if path.is_symlink():
        refuse_outside(path, root)
    if not path.is_file():
        raise ValueError(f"{shown(path)} is {'a link to nothing' if path.is_symlink() else 'not a regular file'}")
    return path


def refuse_outside(path: Path, root: str) -> None:
    """Raises ValueError if path is a link that leads out of root, the directory that is being read."""
    if not lies_inside(path, root):
        raise ValueError(
            f"{shown(path)} is a link out of the directory, to {shown(os.path.realpath(path))}: what is read stays "
            f"inside {root}; copy the directory with its links followed (cp -rL), or move what it links to inside"
        )


def require_there(path: Path) -> None:
    """Raises FileNotFoundError if nothing is at path, or a link to nothing; OSError if the system refuses to look."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            text = f"{shown(path)} is a link to nothing ({shown(path.readlink())} is not there)"
            raise FileNotFoundError(text) from None
        raise FileNotFoundError(f"{shown(path)} does not exist") from None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> OSError:
    """The error, of the same kind, in a sentence that names the path."""
    return OSError(error.errno, f"{shown(path)} cannot be read: {error.strerror or error}")


def read_object(file: BinaryIO) -> dict[str, Any]:
    """What a file that holds a JSON object holds. ValueError: it holds none, or is longer than any that is read."""
    if (size := os.fstat(file.fileno()).st_size) > LARGEST_TABLE:
        raise ValueError(f"it has {size} bytes; at most {LARGEST_TABLE} are read")
    table = parse_json(file.read())
    if not isinstance(table, dict):
        raise ValueError("it is not a JSON object")
    return table


def parse_json(text: bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, has an object with a name twice, or is nested so deeply that handling it could exhaust
            the stack.
    """
    too_deep = f"it is nested more than {DEEPEST} levels deep"
    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError(too_deep) from None
    level: Iterable[Any] = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in values_in(outer)]
        if not level:
            return value
    raise ValueError(too_deep)


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shorten(twice)} is there twice")
    return table


def values_in(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def sha256_of_bytes(data: bytes) -> str:
    """The sha256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(file: BinaryIO) -> str:
    """The sha256, in hex, of what is left to read."""
    sha256 = hashlib.sha256()
    while data := file.read(AT_ONCE):
        sha256.update(data)
    return sha256.hexdigest()


def sha256_on_disk(path: Path) -> str:
    """The sha256, in hex, of what the disk gives back, not of the pages that memory still holds of the file."""
    with path.open("rb", buffering=0) as reader:
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return sha256_of(reader)


class HashingFile:
    """The write side of a file that hashes what passes, so that no byte is read again for its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        self.nbytes += memoryview(data).nbytes
        return self.file.write(data)


def copy_hashing(source: Path, target: Path) -> HashingFile:
    """Copies a file to a new one. What is returned holds the number of bytes and their sha256.

    Raises:
        FileExistsError: there is a target.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        hashing = HashingFile(writer)
        while data := reader.read(AT_ONCE):
            hashing.write(data)
    return hashing


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def removed_on_error(part: Path) -> Iterator[Path]:
    """The part file, which does not stay if what is done with it fails."""
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_free(target: Path, root: Path) -> bool:
    """Whether a file can be made at target: nothing is there, and folders inside root, links followed, lead to it."""
    nearest = next(folder for folder in target.parents if os.path.lexists(folder))
    return not os.path.lexists(target) and nearest.is_dir() and lies_inside(nearest, root)


def place_file(part: Path, final: Path) -> None:
    """Gives a finished file its name. FileExistsError: there is something of that name, which stays."""
    if os.path.lexists(final):
        raise taken(final)
    part.rename(final)


def place_empty_file(final: Path) -> None:
    """Makes an empty file, unless it is there. FileExistsError: something else is."""
    try:
        final.open("xb").close()
    except FileExistsError:
        if final.is_symlink() or not final.is_file():
            raise taken(final) from None


def taken(final: Path) -> FileExistsError:
    return FileExistsError(f"{shown(final)} is there already, and this conversion did not write it; move it away")
