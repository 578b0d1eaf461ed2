"""The squish directory on disk: what its files are called, writing one tensor, reading all. See docs/checkpoints.md.

What becomes of a tensor's values is decided elsewhere (encode.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from squish_nf4.checkpoint.lossless import Array, dtype_named
from squish_nf4.checkpoint.names import check_key, shorten
from squish_nf4.checkpoint.npy_file import StoredFile, write_npy
from squish_nf4.checkpoint.stored_tensor import read_tensor

MANIFEST = "manifest.json"
STATS = "stats.json"
SIDECAR = "squish_nf4.json"
TENSORS = "tensors"
READY = ".manifest_ready"
RESERVED = (MANIFEST, STATS, SIDECAR, TENSORS)


def create(path: Path) -> None:
    """Makes an empty, unfinished squish directory. FileExistsError: something is there already."""
    refuse_unless_empty(path)
    (path / TENSORS).mkdir(parents=True)


def refuse_unless_empty(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} is not empty; convert into a new or an empty directory")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a directory")


def write_tensor(path: Path, key: str, arrays: Mapping[str, Array]) -> list[StoredFile]:
    """Writes one tensor's arrays, given by file suffix."""
    return [write_npy(path / TENSORS / f"{key}{suffix}.npy", array) for suffix, array in arrays.items()]


def finish(path: Path, manifest: Mapping[str, str], stats: Mapping[str, Any], sidecar: Mapping[str, Any]) -> None:
    """Writes the three tables, and last the empty file that says the directory is complete."""
    for name, table in ((MANIFEST, manifest), (STATS, stats), (SIDECAR, sidecar)):
        with (path / name).open("x", encoding="ascii") as file:
            json.dump(table, file, indent=2, ensure_ascii=True, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
    (path / TENSORS / READY).open("x").close()


def describe_unfinished(path: Path) -> str:
    """What a conversion that stopped has left, and what to do about it."""
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    return (
        f"{path} is left unfinished ({len(files)} files, {size:.1f} MiB, no {TENSORS}/{READY}): "
        "no reader takes it for a checkpoint; remove it before converting again"
    )


def load_npy_dir(
    path: str | os.PathLike[str], dtype: torch.dtype | Literal["source"] | None = None
) -> dict[str, Tensor]:
    """Read a squish directory: every tensor under its original name and in its original shape, on the CPU.

    Args:
        path: the directory; its files may be .npy or .npy.zst, and written by another program.
        dtype: of the floating-point tensors. None: float32. "source": what each tensor had before conversion, as
            squish_nf4.json records it. Integers and bool always come in their own.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory is unfinished or damaged, or holds a tensor in a form this library does not read.
        TypeError: dtype is not a floating-point type.
    """
    return dict(iter_npy_dir(path, dtype))


def iter_npy_dir(
    path: str | os.PathLike[str], dtype: torch.dtype | Literal["source"] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """load_npy_dir, one (name, tensor) at a time, in the order of the manifest."""
    path = Path(path)
    wanted = torch.float32 if dtype is None else dtype
    if wanted != "source" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise TypeError(f'load_npy_dir: dtype must be a floating-point dtype, "source" or None, got {dtype!r}')
    require_finished(path)
    manifest = read_manifest(path)
    dtypes = read_source_dtypes(path, manifest) if wanted == "source" else dict.fromkeys(manifest, wanted)
    for name, key in manifest.items():
        yield name, read_tensor(path / TENSORS, name, key, dtypes[name])


def require_finished(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory")
    if not (path / TENSORS / READY).exists():
        raise ValueError(f"{path} is not a finished squish directory: it has no {TENSORS}/{READY}")


def read_manifest(path: Path) -> dict[str, str]:
    """{name: key}, every key safe to make file names of and used once."""
    manifest = read_table(path / MANIFEST)
    owner: dict[str, str] = {}
    for name, key in manifest.items():
        if not isinstance(key, str):
            raise ValueError(f"{path / MANIFEST}: the key of {shorten(name)} is not a string")
        check_key(key, name)
        if key in owner:
            raise ValueError(
                f"{path / MANIFEST}: {shorten(owner[key])} and {shorten(name)} share the key {shorten(key)}"
            )
        owner[key] = name
    return manifest


def read_source_dtypes(path: Path, names: Iterable[str]) -> dict[str, torch.dtype]:
    """{name: the dtype before conversion}, from our own sidecar."""
    file = path / SIDECAR
    if not file.exists():
        raise ValueError(f'{path} has no {SIDECAR}, so dtype="source" is unknown; another program wrote it')
    records: Any = read_table(file).get("tensors")
    dtypes: dict[str, torch.dtype] = {}
    for name in names:
        try:
            dtypes[name] = dtype_named(records[name]["source_dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} does not say which dtype {shorten(name)} had: {error!r}") from error
    return dtypes


def read_table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file} is not a JSON object")
    return table
