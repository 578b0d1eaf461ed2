"""What a checkpoint holds before conversion: the tensors of its safetensors shards, and the small files beside them.

Opening a source reads headers only; iterating over it holds one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from squish_nf4.checkpoint.names import listed, shorten

INDEX_SUFFIX = ".safetensors.index.json"
SMALL_FILE = 64 * 2**20  # the largest tokenizers are near 35 MB
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".tflite",
)

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
    """One tensor as a header describes it."""

    name: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Source:
    """A checkpoint to read: its tensors shard by shard, the small files to copy along, and what is worth telling."""

    entries: list[Entry]
    small_files: list[tuple[Path, Path]] = field(default_factory=list)  # (file, its place relative to the source)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def tensors(self) -> Iterator[tuple[Entry, Tensor]]:
        for shard, entries in groupby(self.entries, key=lambda entry: entry.shard):
            with opened(shard) as file:
                for entry in entries:
                    yield entry, file.get_tensor(entry.name)


def open_source(path: Path) -> Source:
    """Reads the headers of one .safetensors file, or of the shards in a directory.

    Raises:
        FileNotFoundError: path, or a shard that the index names, is not there.
        ValueError: nothing to convert, a damaged shard, an index that is wrong, or a dtype that cannot be stored.
    """
    if path.is_dir():
        source = open_directory(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    elif path.suffix == ".safetensors":
        source = Source(list_tensors([path]))
    else:
        raise ValueError(f"{path} is neither a directory nor a .safetensors file")
    if not source.entries:
        raise ValueError(f"{path} holds no tensors")
    return source


def open_directory(directory: Path) -> Source:
    index = find_index(directory)
    shards = read_index(index) if index else {shard: set() for shard in find_shards(directory)}
    if not shards:
        raise ValueError(f"{directory} holds no .safetensors file{other_weights(directory)}")
    source = Source(list_tensors(shards))
    if index:
        source.notes += compare_with_index(source.entries, shards, index)
    collect_small_files(directory, {*shards, index}, source)
    return source


def find_shards(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("."))


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


def read_index(index: Path) -> dict[Path, set[str]]:
    """{shard: the tensors it should hold}, in the order of the file names."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names_of: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            names_of.setdefault(shard, set()).add(name)
        strange = [shard for shard in names_of if Path(shard).name != shard or Path(shard).suffix != ".safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    if strange:
        raise ValueError(f"{index} names {shorten(strange[0])}, which is no .safetensors file of its directory")
    missing = sorted(shard for shard in names_of if not (index.parent / shard).exists())
    if missing:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not in {index.parent} ({len(missing)} missing)")
    return {index.parent / shard: names_of[shard] for shard in sorted(names_of)}


def compare_with_index(entries: list[Entry], shards: dict[Path, set[str]], index: Path) -> list[str]:
    """Refuses an index that promises what its shards do not hold; notes what they hold beyond it."""
    held: dict[Path, set[str]] = {shard: set() for shard in shards}
    for entry in entries:
        held[entry.shard].add(entry.name)
    for shard, promised in shards.items():
        if lost := sorted(promised - held[shard]):
            raise ValueError(
                f"{index} says that {shard.name} holds {shorten(lost[0])}, but it does not ({len(lost)} missing)"
            )
    extra = [name for shard, promised in shards.items() for name in sorted(held[shard] - promised)]
    return [f"in the shards but not in {index.name}, converted all the same: {listed(extra)}"] if extra else []


def list_tensors(shards: Iterable[Path]) -> list[Entry]:
    """Every tensor of the shards, from their headers; refuses a name that two shards hold."""
    entries: dict[str, Entry] = {}
    for shard in shards:
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not iterable)
                if name in entries:
                    raise ValueError(f"tensor {shorten(name)} is in both {entries[name].shard.name} and {shard.name}")
                header = file.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"tensor {shorten(name)} in {shard.name} is {header.get_dtype()}, which has no .npy form"
                    )
                entries[name] = Entry(name, shard, dtype, tuple(header.get_shape()))
    return list(entries.values())


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """safe_open, with errors that name the file and the usual cause."""
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with shard.open("rb") as file:
            is_pointer = file.read(30).startswith(b"version https://git-lfs")
        cause = "a Git LFS pointer; fetch the weights with: git lfs pull" if is_pointer else f"damaged: {error}"
        raise ValueError(f"{shard} is {cause}") from error


def collect_small_files(directory: Path, converted: set[Path | None], source: Source) -> None:
    """Config, tokenizer and the like, folders too. Hidden files are a tool's, and stay; others are copied or noted."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(directory, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        linked = [name for name in subfolders if Path(folder, name).is_symlink()]  # os.walk does not enter those
        for name in sorted(files) + linked:
            file = Path(folder, name)
            if file in converted or name.startswith(".") or name.endswith(INDEX_SUFFIX):
                continue
            place = file.relative_to(directory)
            if obstacle := reason_to_leave(file):
                source.notes.append(f"not copied: {place} ({obstacle})")
            else:
                source.small_files.append((file, place))


def reason_to_leave(file: Path) -> str | None:
    if not file.is_file():
        return "not a file, or a link to a folder"
    if file.suffix in WEIGHT_SUFFIXES:
        return "weights outside the converted shards"
    size = file.stat().st_size
    return f"{size / 2**20:.0f} MiB is not a small file" if size > SMALL_FILE else None


def other_weights(directory: Path) -> str:
    found = sorted(file.name for file in directory.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    return f" (it holds {found[0]}; save it as safetensors first)" if found else ""
