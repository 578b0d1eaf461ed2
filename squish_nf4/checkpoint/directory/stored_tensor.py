"""One tensor of a squish directory: its files found, opened and held to each other, then read as a torch tensor."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from squish_nf4.checkpoint.directory.format import ENDS, SUFFIXES
from squish_nf4.checkpoint.directory.npy_reader import NpyFile, open_npy
from squish_nf4.checkpoint.files import refuse_outside, require_file
from squish_nf4.checkpoint.messages import shorten, visible
from squish_nf4.checkpoint.resources import require_memory
from squish_nf4.checkpoint.values import MOST_DIMENSIONS, WIDENED, Array, dtype_name
from squish_nf4.layout import stored_bits_per_weight
from squish_nf4.ops import COMPUTE_DTYPES, dequantize_nf4

AT_ONCE = 2**20  # elements decoded or cast at once: what a check of them takes is next to nothing


class Folder:
    """The folder of a squish directory's arrays, listed once. root: the directory, resolved; links may not leave it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = os.path.realpath(path.parent)
        refuse_outside(path, self.root)
        self.names = frozenset(os.listdir(path))

    def find(self, stem: str) -> Path | None:
        """The file stem.npy or stem.npy.zst, or None; both together are refused, for they may differ."""
        found = [stem + end for end in ENDS if stem + end in self.names]
        if len(found) > 1:
            raise ValueError(f"{self.path / found[0]} is there twice, plain and as .zst; remove one of them")
        return require_file(self.path / found[0], self.root) if found else None

    def open(self, stem: str) -> NpyFile | None:
        """The array of that stem, if there is one: its header is read, and agrees with the size of its file."""
        path = self.find(stem)
        return open_npy(path) if path else None

    def forms(self, key: str) -> str:
        """The files of this tensor, for a message."""
        return ", ".join(sorted(self.ends.get(key, ()))) or "nothing"

    @cached_property
    def ends(self) -> defaultdict[str, list[str]]:
        """What the names of a key's files end in. A key ends at the last "__": a__b__pt.npy is not of the key a."""
        ends: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names:
            key, mark, end = name.rpartition("__")
            ends[key].append(mark + end)
        return ends

    def unclaimed(self, keys: Iterable[str]) -> list[str]:
        """Files with our suffixes that are of no tensor with one of these keys."""
        ours = tuple(suffix + end for suffix in SUFFIXES for end in ENDS)
        claimed = {key + suffix for key in keys for suffix in ours}
        return sorted(name for name in self.names - claimed if name.endswith(ours))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk. All that headers can tell has been checked; no value has been read.

    name: the one that owns the files. files: by suffix, __nf4 and __s_nf4, or __pt, and __shape if there is one.
    """

    name: str
    shape: tuple[int, ...]
    files: Mapping[str, NpyFile]

    @property
    def kind(self) -> Literal["nf4", "kept"]:
        return "nf4" if "__nf4" in self.files else "kept"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values as they are stored; of a tensor in NF4 that of its scales."""
        return as_torch(np.empty(0, self.files["__s_nf4" if self.kind == "nf4" else "__pt"].dtype)).dtype

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, d) of a tensor in NF4."""
        rows, columns = self.files["__nf4"].shape
        return rows, 2 * columns

    @property
    def group_size(self) -> int | None:
        """Stored nowhere: it is the ratio of the two widths. None if the tensor was kept."""
        return self.matrix_shape[1] // self.files["__s_nf4"].shape[1] if self.kind == "nf4" else None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the stored values, without file headers and before compression; 0 if there are none."""
        if not self.size:
            return 0.0
        columns = self.matrix_shape[1] if self.kind == "nf4" else 1
        return stored_bits_per_weight(columns, self.group_size, self.dtype.itemsize)

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Memory that read(dtype) takes; an array that is mapped as it lies takes none."""
        if self.kind == "nf4":
            return self.size * dtype.itemsize
        changes = self.dtype.is_floating_point and self.dtype != dtype
        return self.size * (dtype.itemsize if changes else self.files["__pt"].compressed * self.dtype.itemsize)

    def load_nf4(self) -> tuple[Array, Array]:
        """The arrays of a tensor in NF4: packed, (rows, d/2) uint8, and scales, (rows, d/group_size) float32."""
        return self.files["__nf4"].load(), self.files["__s_nf4"].load()

    def kept(self) -> Array:
        """The values of a tensor that was kept, as they are stored, in the tensor's shape."""
        return self.files["__pt"].load().reshape(self.shape)

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in its original shape; dtype is for floating-point values only.

        Raises:
            ValueError: a file is damaged or has changed, or dtype cannot hold a value.
        """
        try:
            require_memory(self.bytes_as(dtype), f"in {dtype_name(dtype)}, it")
            return (self.decode(dtype) if self.kind == "nf4" else self.cast(dtype)).reshape(self.shape)
        except ValueError as error:
            raise ValueError(f"tensor {shorten(self.name)}: {visible(str(error))}") from error

    def decode(self, dtype: torch.dtype) -> Tensor:
        """A tensor in NF4 as a matrix of values, decoded some rows at a time unless dtype is float32."""
        packed, scales = map(as_torch, self.load_nf4())
        decoded = partial(dequantize_nf4, group_size=self.group_size or 1)
        if dtype == torch.float32:
            return decoded(packed, scales)
        values = packed.new_empty(self.matrix_shape, dtype=dtype)
        rounded = dtype if dtype in COMPUTE_DTYPES else torch.float32
        rows = max(1, AT_ONCE // self.matrix_shape[1])
        for target, *block in zip(*(torch.split(whole, rows) for whole in (values, packed, scales)), strict=True):
            target.copy_(decoded(*block, dtype=rounded))
            if is_narrower(dtype, torch.float32) and bool(block[1].isfinite().all()):
                refuse_values_lost(~is_finite(target), dtype)
        return values

    def cast(self, dtype: torch.dtype) -> Tensor:
        """A kept tensor, its floating-point values in dtype; mapped as it lies where nothing changes."""
        tensor = as_torch(self.kept())
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        values = torch.empty_like(tensor, dtype=dtype)
        for target, block in zip(*(torch.split(whole.view(-1), AT_ONCE) for whole in (values, tensor)), strict=True):
            target.copy_(block)
            if is_narrower(dtype, tensor.dtype):
                refuse_values_lost(block.isfinite() & ~is_finite(target), dtype)
        return values


def is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a finite value of other can become infinite in dtype, or NaN where dtype has no infinity."""
    return torch.finfo(dtype).max < torch.finfo(other).max


def is_finite(values: Tensor) -> Tensor:
    return (values.float() if values.dtype in WIDENED else values).isfinite()  # torch asks no 8-bit float


def refuse_values_lost(lost: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if any element is marked as lost in dtype."""
    if bool(lost.any()):
        raise ValueError(
            f"holds values that {dtype_name(dtype)} cannot; read it with dtype='source' or in a wider type"
        )


def as_torch(values: Array) -> Tensor:
    """The array as a tensor on the same memory. ValueError: torch has no such dtype."""
    try:
        return torch.from_numpy(values)
    except TypeError as error:
        raise ValueError(f"torch has no {values.dtype}") from error


def open_tensor(folder: Folder, name: str, key: str) -> StoredTensor:
    """The tensor stored under key.

    Raises:
        ValueError: its files are missing, damaged, at odds with each other, or of a form not read here.
    """
    try:
        files = find_files(folder, key)
        tensor = StoredTensor(name, read_shape(folder, key, files), files)
        require_torch_dtype(tensor)
        return tensor
    except ImportError as error:
        raise ImportError(f"tensor {shorten(name)}: {visible(str(error))}") from None
    except ValueError as error:
        raise ValueError(f"tensor {shorten(name)}: {visible(str(error))}") from error


def find_files(folder: Folder, key: str) -> dict[str, NpyFile]:
    """The arrays of a key by suffix: __nf4 with __s_nf4, or __pt. ValueError: there is anything else."""
    if pickled := folder.find(f"{key}__pt_df11"):
        raise ValueError(
            f"{pickled.name} is a pickle of another program, and reading a pickle may run anything; "
            "let that program write the tensor as __pt.npy"
        )
    opened = {suffix: folder.open(key + suffix) for suffix in ("__nf4", "__s_nf4", "__pt")}
    files = {suffix: file for suffix, file in opened.items() if file}
    if files.keys() == {"__nf4", "__s_nf4"}:
        require_fitting(files["__nf4"], files["__s_nf4"])
    elif files.keys() != {"__pt"}:
        raise ValueError(
            f"wanted are {key}__nf4.npy with {key}__s_nf4.npy, or {key}__pt.npy alone; found: {folder.forms(key)}"
        )
    return files


def require_fitting(packed: NpyFile, scales: NpyFile) -> None:
    if packed.dtype != np.uint8 or scales.dtype != np.float32:
        raise ValueError(
            f"{packed.path.name} must be uint8 and {scales.path.name} float32, got {packed.dtype} and {scales.dtype}"
        )
    fits = len(packed.shape) == len(scales.shape) == 2 and packed.shape[0] == scales.shape[0]
    if not fits or not packed.shape[1] or not scales.shape[1] or 2 * packed.shape[1] % scales.shape[1]:
        raise ValueError(
            f"{packed.path.name} {packed.shape} and {scales.path.name} {scales.shape} do not belong together"
        )


def read_shape(folder: Folder, key: str, files: dict[str, NpyFile]) -> tuple[int, ...]:
    """What __shape holds, which then stands among the files; without one, the shape of the stored matrix or array."""
    stored = files.get("__pt")
    if stored is None:
        rows, columns = files["__nf4"].shape
        shape: tuple[int, ...] = (rows, 2 * columns)
    else:
        shape = stored.shape
    file = folder.open(f"{key}__shape")
    if file is None:
        return shape
    files["__shape"] = file
    if len(file.shape) == 1 and file.shape[0] > MOST_DIMENSIONS:
        raise ValueError(f"{file.path} says {file.shape[0]} dimensions; at most {MOST_DIMENSIONS} are read")
    sizes: Any = [-1]
    if len(file.shape) == 1 and file.dtype.kind in "iu":
        sizes = file.load().tolist()
    if min(sizes, default=0) < 0 or math.prod(sizes) != math.prod(shape):
        raise ValueError(f"{file.path} is not the shape of {math.prod(shape)} values")
    return tuple(sizes)


def require_torch_dtype(tensor: StoredTensor) -> None:
    for file in tensor.files.values():
        as_torch(np.empty(0, file.dtype))
