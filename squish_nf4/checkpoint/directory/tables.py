"""The JSON tables of a squish directory: which tensors there are, whose files they have, what our sidecar records."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from squish_nf4.checkpoint.directory.format import MANIFEST, SIDECAR, check_key
from squish_nf4.checkpoint.files import read_object, removed_on_error, require_file, sync
from squish_nf4.checkpoint.messages import listed, shorten
from squish_nf4.replace import refuse_to_replace

Records = Mapping[str, Mapping[str, Any]]


def read_manifest(path: Path) -> dict[str, str]:
    """{name: key}, every key safe to make file names of."""
    file = path / MANIFEST
    manifest = read_table(file)
    for name, key in manifest.items():
        if not isinstance(key, str):
            raise ValueError(f"{file}: the key of {shorten(name)} is not a string")
        check_key(key, name)
    return manifest


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Our own table, whose "tensors" are Records; None if there is none."""
    file = path / SIDECAR
    if not os.path.lexists(file):
        return None
    sidecar = read_table(file)
    records = sidecar.get("tensors")
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise ValueError(f"{file} records no tensors: its 'tensors' is not an object of objects")
    return sidecar


def find_owners(path: Path, manifest: Mapping[str, str], records: Records) -> dict[str, str]:
    """{name: the name whose files it has}: itself, or for a tied tensor the one that it is tied to.

    Raises:
        ValueError: two tensors have one key and are not tied, or a record ties tensors that have two keys.
    """
    names_of: defaultdict[str, list[str]] = defaultdict(list)
    for name, key in manifest.items():
        names_of[key].append(name)
    owners: dict[str, str] = {}
    for key, names in names_of.items():
        owner = next((name for name in names if records.get(name, {}).get("tied_to") is None), names[0])
        if len(names) > 1 and not are_tied(key, names, owner, records):
            raise ValueError(
                f"{path / MANIFEST}: {listed(names)} share the key {shorten(key)}, and nothing says that they are tied"
            )
        owners |= dict.fromkeys(names, owner)
    for name, record in records.items():
        tied_to = record.get("tied_to")
        if name in owners and tied_to is not None and (name == tied_to or owners[name] != tied_to):
            raise ValueError(f"{path / SIDECAR}: {shorten(name)} is tied to {tied_to!r:.100}, which has other files")
    return {name: owners[name] for name in manifest}


def are_tied(key: str, names: Sequence[str], owner: str, records: Records) -> bool:
    """Whether tensors may share a key: their records say so, or it can be the usual key of one of them at most."""
    if all(name == owner or records.get(name, {}).get("tied_to") == owner for name in names):
        return True
    return sum(name.replace(".", "__") == key for name in names) <= 1


def read_table(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a directory. ValueError: it is damaged, or lies outside."""
    if not os.path.lexists(file):
        raise ValueError(f"{file} cannot be read: it is not there")
    require_file(file, os.path.realpath(file.parent))
    try:
        with file.open("rb") as opened:
            return read_object(opened)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def write_table(file: Path, table: Mapping[str, Any], draft: Path) -> None:
    """A JSON object in ASCII, whole or not at all: until it is, it is called draft. OSError: file is a pipe, say."""
    refuse_to_replace(file)
    with removed_on_error(draft):
        with draft.open("x", encoding="ascii") as writer:  # bit by bit: as one text it would be larger than the table
            writer.writelines(json.JSONEncoder(indent=2, ensure_ascii=True, allow_nan=False).iterencode(table))
        sync(draft)
        draft.replace(file)
