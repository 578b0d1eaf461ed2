"""What the files of a squish directory are called, and what state a directory is in. See docs/format.md.

A tensor's files are called after its key, which is made of its name: key_of says what may become a file, keys_of which
two names would share one. Only strings here, apart from one probe that asks the file system whether it can hold two
names at once.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path, PureWindowsPath

from squish_nf4.checkpoint.messages import shorten

MANIFEST = "manifest.json"
STATS = "stats.json"
SIDECAR = "squish_nf4.json"
JOURNAL = "squish_nf4.journal"
DRAFT = f"{JOURNAL}.part"  # of a new journal, until its header is whole
TENSORS = "tensors"  # the folder of the arrays
READY = ".manifest_ready"  # in that folder, made last: without it nothing is read
RESERVED = (MANIFEST, STATS, SIDECAR, JOURNAL, DRAFT, TENSORS)

SUFFIXES = ("__nf4", "__s_nf4", "__shape", "__pt")
ENDS = (".npy", ".npy.zst")
LONGEST_FILE_NAME = 255  # bytes, on every file system in common use
LONGEST_SUFFIX = "__s_nf4.npy.zst"


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


def key_of(name: str) -> str:
    """The start of the names of a tensor's files. Other programs read them, so a bad name is refused, not repaired.

    Raises:
        ValueError: the name is empty, or no file of one folder can be called so.
    """
    key = name.replace(".", "__")
    check_key(key, name)
    length = len((key + LONGEST_SUFFIX).encode())
    if length > LONGEST_FILE_NAME:
        raise ValueError(
            f"tensor {shorten(name)}: a file name would take {length} bytes; file systems allow {LONGEST_FILE_NAME}"
        )
    return key


def check_key(key: str, name: str) -> None:
    """Refuses a key that starts no file name, or one outside its folder. name is the tensor's, for the message."""
    if not key or not name:
        raise ValueError(
            f"tensor {shorten(name)} (key {shorten(key)}): an empty name cannot be stored; every tensor needs one"
        )
    if "\0" in key:
        raise ValueError(f"tensor {shorten(name)}: the name holds a NUL character, which no file name can")
    if "/" in key or "\\" in key or PureWindowsPath(key).drive:
        raise ValueError(
            f"tensor {shorten(name)}: files of that name would leave the directory (a separator or a drive)"
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"tensor {shorten(name)}: the name is not valid Unicode (a lone surrogate)") from None


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """{name: key} in the given order; refuses two names that would share files."""
    keys: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        if key in owner:
            raise ValueError(
                f"tensors {shorten(owner[key])} and {shorten(name)} would both be stored as {shorten(key)}; "
                "rename one of them"
            )
        owner[key] = name
        keys[name] = key
    return keys


def alike(keys: Mapping[str, str]) -> list[list[str]]:
    """Groups of names whose keys differ only by case or Unicode form: one file on macOS or Windows, two on Linux."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, key in keys.items():
        groups[unicodedata.normalize("NFC", unicodedata.normalize("NFC", key).casefold())].append(name)
    return [group for group in groups.values() if len(group) > 1]


def holds_apart(folder: Path, keys: Sequence[str]) -> bool:
    """Whether the file system keeps files of these names apart; tried out, for folders may differ in that."""
    probes = [folder / f"{key}.probe" for key in keys]
    made: list[Path] = []
    try:
        for probe in probes:
            probe.open("xb").close()
            made.append(probe)
    except FileExistsError:
        return False
    finally:
        for probe in made:
            probe.unlink()
    return True
