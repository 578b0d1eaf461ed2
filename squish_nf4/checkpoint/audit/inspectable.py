"""What can be looked at: the tensors of a squish directory, of one file of it, or of a .safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from squish_nf4.checkpoint.directory.format import ENDS, TENSORS
from squish_nf4.checkpoint.directory.reader import SquishDirectory, open_directory
from squish_nf4.checkpoint.messages import shorten
from squish_nf4.checkpoint.source.shards import Entry, open_source, opened
from squish_nf4.checkpoint.values import Array, dtype_name

Load = Callable[[], tuple[Array, Array]]


@dataclass(frozen=True)
class Inspectable:
    """One tensor. load: its packed bytes and scales, None if it is not in NF4. The rest as in Inspected."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int
    bits_per_weight: float
    load: Load | None = None
    tied_to: str | None = None
    reason: str | None = None
    source_dtype: str | None = None
    recorded_error: float | None = None


def list_inspectable(path: Path) -> list[Inspectable]:
    """FileNotFoundError, ValueError: path is nothing of the three, or damaged."""
    if path.name.endswith(".safetensors"):
        return in_safetensors(path)
    if path.name.endswith(ENDS):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        directory = path.absolute().parent.parent
        if path.absolute().parent.name != TENSORS:
            raise ValueError(f"{path} is in no squish directory; only files in a folder {TENSORS} are")
        found = [item for item in in_directory(open_directory(directory), path.name) if item.tied_to is None]
        if not found:
            raise ValueError(f"{path} is of no tensor of {directory}")
        return found
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is neither a squish directory nor a .npy, .npy.zst or .safetensors file")
    return in_directory(open_directory(path))


def in_directory(directory: SquishDirectory, file_name: str | None = None) -> list[Inspectable]:
    """All tensors, or those that a file belongs to."""
    items = []
    for name, tensor in directory.tensors.items():
        if file_name is not None and file_name not in {file.path.name for file in tensor.files.values()}:
            continue
        record = (directory.records or {}).get(tensor.name, {})
        reason, dtype, error = (record.get(what) for what in ("reason", "source_dtype", "relative_error"))
        items.append(
            Inspectable(
                name,
                tensor.shape,
                "nf4" if tensor.kind == "nf4" else str(tensor.files["__pt"].dtype),
                tensor.nbytes,
                tensor.bits_per_weight,
                tensor.load_nf4 if tensor.kind == "nf4" else None,
                tensor.name if tensor.name != name else None,
                reason if isinstance(reason, str) else None,
                dtype if isinstance(dtype, str) else None,
                float(error) if isinstance(error, int | float) else None,
            )
        )
    return items


def in_safetensors(path: Path) -> list[Inspectable]:
    """The state of a quantized model, or any other file."""
    entries = {entry.name: entry for entry in open_source(path).entries}
    scales_of = {name: scales for name, entry in entries.items() if (scales := find_scales(entry, entries))}
    hidden = {scales.name for scales in scales_of.values()}
    items = []
    for name, entry in entries.items():
        if name in hidden:
            continue
        shape, nbytes, stored_as = entry.shape, entry.nbytes, dtype_name(entry.dtype)
        load: Load | None = None
        if scales := scales_of.get(name):
            shape, nbytes, stored_as = (shape[0], 2 * shape[1]), nbytes + scales.nbytes, "nf4"
            load = partial(load_pair, path, name, scales.name)
        size = max(1, torch.Size(shape).numel())
        items.append(Inspectable(name, shape, stored_as, nbytes, 8 * nbytes / size, load))
    return items


def find_scales(entry: Entry, entries: dict[str, Entry]) -> Entry | None:
    """Of a packed weight of an NF4Linear; None for any other tensor."""
    if not entry.name.endswith("weight") or entry.dtype != torch.uint8 or len(entry.shape) != 2:
        return None
    scales = entries.get(f"{entry.name.removesuffix('weight')}scales")
    if scales is None or scales.dtype != torch.float32 or len(scales.shape) != 2:
        return None
    if not scales.shape[1] or scales.shape[0] != entry.shape[0] or 2 * entry.shape[1] % scales.shape[1]:
        raise ValueError(
            f"{shorten(entry.name)} {entry.shape} and {shorten(scales.name)} {scales.shape} do not belong together"
        )
    return scales


def load_pair(path: Path, packed: str, scales: str) -> tuple[Array, Array]:
    with opened(path) as file:
        return file.get_tensor(packed).numpy(), file.get_tensor(scales).numpy()
