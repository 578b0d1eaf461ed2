"""What a checkpoint holds before conversion: the tensors of its safetensors shards, and the small files beside them.

Opening a source reads headers only. A conversion reads values in stretches into memory of their own: several can be
read at once, and a file that is cut short meanwhile is an error and not a dead process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from squish_nf4.checkpoint.files import read_object, require_there
from squish_nf4.checkpoint.messages import brief, listed, shorten, shown
from squish_nf4.checkpoint.source.shard_file import Shard, describe, opened, opened_shard, require_regular
from squish_nf4.checkpoint.source.small_files import INDEX_SUFFIX, collect_small_files, other_weights
from squish_nf4.checkpoint.values import MOST_DIMENSIONS

# safetensors' names of what both torch and numpy can hold, after widening where numpy knows no such float.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it; start is the place of its first byte in the shard."""

    name: str
    shard: Shard
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class Source:
    """A checkpoint to read: its tensors shard by shard, the small files to copy along, and what is worth telling."""

    entries: list[Entry]
    small_files: list[tuple[Path, Path]] = field(default_factory=list)  # (file, its place relative to the source)
    notes: list[str] = field(default_factory=list)

    @property
    def shards(self) -> list[Shard]:
        return list(dict.fromkeys(entry.shard for entry in self.entries))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def tensors(self) -> Iterator[tuple[Entry, Tensor]]:
        """Whole tensors, one at a time, mapped from their files."""
        for shard, entries in groupby(self.entries, key=lambda entry: entry.shard.path):
            with opened_shard(shard) as file:
                for entry in entries:
                    yield entry, file.get_tensor(entry.name)


def read_values(entry: Entry, first: int, count: int) -> Tensor:
    """(count,) values of a tensor, counted row by row, in their own dtype.

    Raises:
        ValueError: the shard has changed since its header was read.
    """
    size = entry.dtype.itemsize
    values = torch.empty(count * size, dtype=torch.uint8)
    unread = values.numpy().data
    with entry.shard.path.open("rb", buffering=0) as file:
        file.seek(entry.start + first * size)
        while unread and (taken := file.readinto(unread)):
            unread = unread[taken:]
        changed = entry.shard.has_changed(os.fstat(file.fileno()))  # at last: it may have been while it was read
    if unread or changed:
        raise ValueError(f"{shown(entry.shard.path)} was changed while it was read")
    return values.view(entry.dtype)


Recalled = Mapping[Path, list[Entry]]  # what the headers of shards said that are there no more


def open_source(path: Path, removed: Recalled = MappingProxyType({})) -> Source:
    """Reads the headers of one .safetensors file, or of the shards in a directory; those of removed ones are recalled.

    Raises:
        FileNotFoundError: path, or a shard that the index names, is not there.
        OSError: one of them cannot be read.
        ValueError: nothing to convert, a damaged shard, an index that is wrong, or a dtype or
            a number of dimensions that cannot be stored.
    """
    if path not in removed:
        require_there(path)
    if path.is_dir():
        source = open_folder(path, removed)
    elif path in removed:
        source = Source(removed[path])
    elif path.suffix == ".safetensors":
        source = Source(list_tensors([path], removed))
    else:
        raise ValueError(f"{path} is neither a directory nor a .safetensors file")
    if not source.entries:
        raise ValueError(f"{path} holds no tensors")
    return source


def open_folder(directory: Path, removed: Recalled) -> Source:
    index = find_index(directory)
    shards = read_index(index, removed) if index else {shard: set() for shard in find_shards(directory, removed)}
    if not shards:
        raise ValueError(f"{directory} holds no .safetensors file{other_weights(directory)}")
    source = Source(list_tensors(shards, removed))
    if index:
        source.notes += compare_with_index(source.entries, shards, index)
    source.small_files, notes = collect_small_files(directory, {*shards, index})
    source.notes += notes
    return source


def find_shards(directory: Path, removed: Recalled) -> list[Path]:
    return sorted({file for file in directory.glob("*.safetensors") if not file.name.startswith(".")} | set(removed))


def find_index(directory: Path) -> Path | None:
    usual = directory / f"model{INDEX_SUFFIX}"
    if usual.exists():
        return usual
    found = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
    if len(found) > 1:
        several = ", ".join(index.name for index in found)
        raise ValueError(
            f"{directory} holds several models ({several}); convert one .safetensors file, or move the others away"
        )
    return found[0] if found else None


def read_index(index: Path, removed: Recalled) -> dict[Path, set[str]]:
    """{shard: the tensors it should hold}, in the order of the file names."""
    no_index = f"{index} is not an index of safetensors shards"
    require_there(index)
    if not index.is_file():
        raise ValueError(f"{no_index}: it is no regular file")
    with opened(index) as file:
        try:
            weight_map = read_object(file).get("weight_map")
        except ValueError as error:
            raise ValueError(f"{no_index}: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{no_index}: its weight_map is not an object of file names")
    names_of: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, set()).add(name)
    strange = [shard for shard in names_of if Path(shard).name != shard or Path(shard).suffix != ".safetensors"]
    if strange:
        raise ValueError(f"{index} names {shorten(strange[0])}, which is no .safetensors file of its directory")
    paths = {index.parent / shard for shard in names_of}
    if missing := sorted(path.name for path in paths if path not in removed and is_missing(path)):
        raise FileNotFoundError(
            f"{index} names {brief(missing[0])}, which is not in {index.parent} ({len(missing)} missing)"
        )
    return {index.parent / shard: names_of[shard] for shard in sorted(names_of)}


def is_missing(shard: Path) -> bool:
    """Whether nothing has that name. What is there and cannot be opened is said when it is read."""
    return not os.path.lexists(shard)


def compare_with_index(entries: list[Entry], shards: dict[Path, set[str]], index: Path) -> list[str]:
    """Refuses an index that promises what its shards do not hold; notes what they hold beyond it."""
    held: dict[Path, set[str]] = {shard: set() for shard in shards}
    for entry in entries:
        held[entry.shard.path].add(entry.name)
    for shard, promised in shards.items():
        if lost := sorted(promised - held[shard]):
            raise ValueError(
                f"{index} says that {brief(shard.name)} holds {shorten(lost[0])}, but it does not ({len(lost)} missing)"
            )
    extra = [name for shard, promised in shards.items() for name in sorted(held[shard] - promised)]
    return [f"in the shards but not in {index.name}, converted all the same: {listed(extra)}"] if extra else []


def list_tensors(shards: Iterable[Path], removed: Recalled) -> list[Entry]:
    """Every tensor of the shards, from their headers; refuses a name that two shards hold."""
    entries: dict[str, Entry] = {}
    for path in shards:
        for entry in removed[path] if path in removed else read_shard_header(path):
            if entry.name in entries:
                raise ValueError(
                    f"tensor {shorten(entry.name)} is in both {brief(entries[entry.name].shard.path.name)} and "
                    f"{brief(path.name)}"
                )
            entries[entry.name] = entry
    return list(entries.values())


def read_shard_header(path: Path) -> list[Entry]:
    require_regular(path)
    shard, start = describe(path)
    with opened_shard(path) as file:
        if describe(path)[0] != shard:  # or the tensors that safetensors tells are of another file
            raise ValueError(f"{shown(path)} was changed while it was read")
        found: dict[str, Entry] = {}
        for name in file.offset_keys():  # safetensors has checked that the tensors lie side by side without a gap
            header = file.get_slice(name)
            dtype = DTYPES.get(header.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"tensor {shorten(name)} in {brief(path.name)} is {header.get_dtype()}, which has no .npy form"
                )
            shape = tuple(header.get_shape())
            if len(shape) > MOST_DIMENSIONS:
                raise ValueError(
                    f"tensor {shorten(name)} in {brief(path.name)} has {len(shape)} dimensions; a .npy file has at "
                    f"most {MOST_DIMENSIONS}"
                )
            found[name] = Entry(name, shard, dtype, shape, start)
            start += found[name].nbytes
        return [found[name] for name in file.keys()]  # noqa: SIM118 (a safetensors file is not iterable)
