"""Tensor names and the file names made of them: what may become a file, and which two names would share one.

Only strings here, apart from one probe that asks the file system whether it can hold two names at once.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath

LONGEST_FILE_NAME = 255  # bytes, on every file system in common use
LONGEST_SUFFIX = "__s_nf4.npy.zst"


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


def matching(name: str, patterns: Iterable[str]) -> list[str]:
    """The patterns that name contains, or that match all of it as a shell glob."""
    return [pattern for pattern in patterns if pattern in name or fnmatchcase(name, pattern)]


def shorten(name: str, limit: int = 100) -> str:
    """A name for a message: quoted, control characters escaped, and of bounded length."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]} ({len(name)} characters)"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shorten(name) for name in names[:limit]) + more
