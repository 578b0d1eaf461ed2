"""What is in a squish directory, tensor by tensor, in numbers: bits, errors, where they are, how levels are used.

With the source errors are measured. Without it they are what the converter recorded, or else an estimate: the largest
weight of a group is exact, and every other one lay anywhere in the cell of its level with equal chance.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from squish_nf4.checkpoint.audit.compare import nibbles
from squish_nf4.checkpoint.audit.inspectable import Inspectable, list_inspectable
from squish_nf4.checkpoint.audit.measure import Group, GroupErrors
from squish_nf4.checkpoint.directory.stored_tensor import as_torch
from squish_nf4.checkpoint.messages import Progress, shorten
from squish_nf4.checkpoint.source.shards import open_source
from squish_nf4.checkpoint.values import WIDENED, dtype_name, row_slices, to_numpy
from squish_nf4.ops import dequantize_nf4

Basis = Literal["measured", "recorded", "estimated"]

TILE = 2**18  # weights looked at in one step


def entropy_of(counts: Sequence[int]) -> float:
    """Bits of information in an index, from how often each level is used; 4 if all are used alike."""
    shares = np.array(counts) / max(1, sum(counts))
    used = shares[shares > 0]
    return float(-(used * np.log2(used)).sum()) + 0.0


@dataclass(frozen=True)
class Nf4Numbers:
    """Of a tensor in NF4.

    basis: where relative_rms comes from. relative_rms: ||w - decoded|| / ||w||. cosine, largest_error: of w and
    decoded, only measured. squared_norm: ||w||^2 if measured, else ||decoded||^2. indices: how often each of the 16
    levels is used. scales: smallest, median, largest magnitude. group_errors: how many groups have a relative error in
    each bin of ERROR_EDGES. worst: the groups that make the most of the squared error, the worst first; measured, else
    estimated.
    """

    group_size: int
    basis: Basis
    relative_rms: float
    cosine: float | None
    largest_error: float | None
    squared_norm: float
    indices: tuple[int, ...]
    scales: tuple[float, float, float]
    group_errors: tuple[int, ...]
    worst: tuple[Group, ...]

    @property
    def snr(self) -> float:
        """Signal to noise in dB; infinite without an error."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf

    @property
    def entropy(self) -> float:
        return entropy_of(self.indices)


@dataclass(frozen=True)
class Inspected:
    """One tensor. nbytes: of its files, or in its file. stored_as: "nf4", or the dtype it was kept in."""

    name: str
    tied_to: str | None
    shape: tuple[int, ...]
    stored_as: str
    reason: str | None
    source_dtype: str | None
    nbytes: int
    bits_per_weight: float
    nf4: Nf4Numbers | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """tensors: in the order of the file. Tied ones are there under each name; sums count them once."""

    path: Path
    source: Path | None
    tensors: tuple[Inspected, ...]
    seconds: float

    @property
    def owned(self) -> list[Inspected]:
        return [tensor for tensor in self.tensors if tensor.tied_to is None]

    @property
    def in_nf4(self) -> list[tuple[Inspected, Nf4Numbers]]:
        return [(tensor, tensor.nf4) for tensor in self.owned if tensor.nf4]

    @property
    def weights(self) -> int:
        return sum(tensor.size for tensor in self.owned)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.owned)

    @property
    def bits_per_weight(self) -> float:
        """Of everything."""
        return sum(tensor.bits_per_weight * tensor.size for tensor in self.owned) / max(1, self.weights)

    @property
    def nf4_bits_per_weight(self) -> float:
        weights = sum(tensor.size for tensor, _ in self.in_nf4)
        return sum(tensor.bits_per_weight * tensor.size for tensor, _ in self.in_nf4) / max(1, weights)

    @property
    def relative_rms(self) -> float:
        """Of all weights in NF4 together."""
        norm = sum(numbers.squared_norm for _, numbers in self.in_nf4)
        error = sum(numbers.squared_norm * numbers.relative_rms**2 for _, numbers in self.in_nf4)
        return math.sqrt(error / norm) if norm else 0.0

    @property
    def indices(self) -> tuple[int, ...]:
        """How often each level is used, in all tensors."""
        return tuple(map(sum, zip(*(numbers.indices for _, numbers in self.in_nf4), strict=True))) or (0,) * 16

    @property
    def bases(self) -> list[Basis]:
        """Where the errors come from, without repetition."""
        return list(dict.fromkeys(numbers.basis for _, numbers in self.in_nf4))

    @property
    def groups(self) -> str:
        """Where the errors of single groups come from: no record has them."""
        return "measured" if self.bases == ["measured"] else "estimated"


def inspect(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Inspection:
    """Look at every tensor of a squish directory, or at one file.

    Args:
        path: a squish directory; one .npy file of it, for its tensor alone; or a .safetensors file, in which a uint8
            X.weight beside a float32 X.scales is an NF4Linear's.
        source: what it was made of, to measure errors: a .safetensors file or a model's directory.
        progress: called as each tensor begins.

    Raises:
        FileNotFoundError: path or source is not there.
        ValueError: one of them cannot be read, or a tensor has another shape in the source.
    """
    started = time.perf_counter()
    path = Path(path)
    items = {item.name: item for item in list_inspectable(path)}
    original = open_source(Path(source)) if source is not None else None
    announce = progress or (lambda _: None)
    total, done = sum(item.nbytes for item in items.values()), 0
    numbers: dict[str, Nf4Numbers] = {}

    def look(item: Inspectable, w: Tensor | None) -> None:
        nonlocal done
        announce(Progress(item.name, done, total))
        numbers[item.name] = measure(item, w)
        done += item.nbytes

    for entry, w in original.tensors() if original else ():
        item = items.get(entry.name)
        if item is not None and item.load is not None and item.tied_to is None:
            look(item, w)
    for item in items.values():
        if item.load is not None and item.tied_to is None and item.name not in numbers:
            look(item, None)
    return Inspection(
        path,
        Path(source) if source is not None else None,
        tuple(describe(item, numbers.get(item.tied_to or item.name)) for item in items.values()),
        time.perf_counter() - started,
    )


def describe(item: Inspectable, numbers: Nf4Numbers | None) -> Inspected:
    return Inspected(
        item.name,
        item.tied_to,
        item.shape,
        item.stored_as,
        item.reason,
        item.source_dtype,
        item.nbytes,
        item.bits_per_weight,
        numbers,
    )


def measure(item: Inspectable, w: Tensor | None) -> Nf4Numbers:
    """Everything about a tensor in NF4; w: the one it was made of."""
    assert item.load is not None
    packed, scales = item.load()
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group_size = columns // scales.shape[1]
    matrix = matching_matrix(item, w, (rows, columns))
    errors = GroupErrors(scales.shape)
    indices = np.zeros(16, np.int64)
    for tile in row_slices(rows, columns, TILE):
        used = nibbles(packed[tile])
        indices += np.bincount(used.reshape(-1), minlength=16)
        if matrix is None:
            errors.estimate(tile, used, scales[tile])
        else:
            exact = to_numpy(matrix[tile].double()).astype(np.float64, copy=False)
            decoded = dequantize_nf4(as_torch(packed[tile]), as_torch(scales[tile]), group_size).numpy()
            errors.measure(tile, exact, decoded.astype(np.float64))
    basis: Basis = "measured" if matrix is not None else "estimated"
    relative_rms = errors.relative_rms
    if matrix is None and item.recorded_error is not None:
        basis, relative_rms = "recorded", item.recorded_error
    magnitudes = np.abs(scales)
    return Nf4Numbers(
        group_size=group_size,
        basis=basis,
        relative_rms=relative_rms,
        cosine=errors.cosine if matrix is not None else None,
        largest_error=errors.largest_error if matrix is not None else None,
        squared_norm=float(errors.norm.sum()),
        indices=tuple(int(n) for n in indices),
        scales=(float(magnitudes.min()), float(np.median(magnitudes)), float(magnitudes.max())) if rows else (0, 0, 0),
        group_errors=errors.histogram(),
        worst=errors.worst(scales, group_size),
    )


def matching_matrix(item: Inspectable, w: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if w is None:
        return None
    if tuple(w.shape) != item.shape or not w.is_floating_point():
        found = f"{dtype_name(w.dtype)} {tuple(w.shape)}"
        raise ValueError(f"tensor {shorten(item.name)} has shape {item.shape}; in the source it is {found}")
    return (w.float() if w.dtype in WIDENED else w).reshape(shape)
