"""The errors of a tensor in NF4, group by group: measured against the weights, or estimated from their indices.

Without the weights errors are what the converter recorded, or else an estimate: the largest weight of a group is exact,
and every other one lay anywhere in the cell of its level with equal chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from squish_nf4._C import boundaries, codebook, unpack_indices
from squish_nf4.checkpoint.directory.stored_tensor import as_torch
from squish_nf4.checkpoint.values import Array, row_slices, to_numpy
from squish_nf4.ops import dequantize_nf4, relative_error

Floats = NDArray[np.float64]
Basis = Literal["measured", "recorded", "estimated"]

AT_ONCE = 2**18  # weights looked at in one step
WORST = 5
ERROR_EDGES = np.linspace(0, 0.25, 51)  # bins of the relative errors of groups; the last holds what is beyond


@dataclass(frozen=True)
class Group:
    """Neighbouring columns of one row with one scale.

    Attributes:
        row: of the tensor as a matrix.
        columns: the first and the last.
        scale: theirs.
        share: of the tensor's squared error.
        relative_rms: the relative error of the group alone.
    """

    row: int
    columns: tuple[int, int]  # first and last
    scale: float
    share: float
    relative_rms: float


class GroupErrors:
    """The squared errors and norms of each group, and what is needed of the whole. shape: that of the scales."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.error: Floats = np.zeros(shape)
        self.norm: Floats = np.zeros(shape)
        self.product = self.decoded_norm = self.largest_error = 0.0

    def by_group(self, values: Floats) -> Floats:
        """(rows, columns) summed within groups: (rows, groups)."""
        return np.asarray(values.reshape(len(values), self.error.shape[1], -1).sum(axis=2))

    def add_measured(self, rows: slice, exact: Floats, decoded: Floats) -> None:
        """Takes in some rows of weights, and what they decode to."""
        difference = exact - decoded
        self.error[rows] = self.by_group(difference**2)
        self.norm[rows] = self.by_group(exact**2)
        self.product += float((exact * decoded).sum())
        self.decoded_norm += float((decoded**2).sum())
        self.largest_error = max(self.largest_error, float(np.abs(difference).max(initial=0)))

    def add_estimated(self, rows: slice, indices: NDArray[np.uint8], scales: Array) -> None:
        """Takes in some rows of indices, whose weights are not known: see the module."""
        squared = scales.astype(np.float64) ** 2
        flat = indices.reshape(len(indices), -1)
        cells = CELL_ERRORS[flat]
        exact = cells.reshape(len(cells), self.error.shape[1], -1).max(axis=2)  # the outer cells are the widest
        self.error[rows] = (self.by_group(cells) - exact) * squared
        self.norm[rows] = self.by_group(LEVELS[flat] ** 2) * squared

    @property
    def relative_rms(self) -> float:
        return relative_error(float(self.error.sum()), float(self.norm.sum()))

    @property
    def cosine(self) -> float:
        norms = math.sqrt(float(self.norm.sum()) * self.decoded_norm)
        return self.product / norms if norms else 1.0

    @property
    def relative(self) -> Floats:
        """The relative error of each group; 0 for a group of zeros."""
        return np.sqrt(np.divide(self.error, self.norm, out=np.zeros_like(self.error), where=self.norm > 0))

    def histogram(self) -> tuple[int, ...]:
        inside = np.minimum(self.relative, ERROR_EDGES[-1])
        return tuple(int(n) for n in np.histogram(inside, ERROR_EDGES)[0])

    def worst(self, scales: Array, group_size: int) -> tuple[Group, ...]:
        """The groups that make the most of the squared error, the worst first; none without an error."""
        flat, total, relative = self.error.reshape(-1), float(self.error.sum()), self.relative
        count = min(WORST, int(np.count_nonzero(flat)))
        largest = np.argpartition(flat, -count)[flat.size - count :] if count else np.empty(0, np.int64)
        groups = []
        for place in sorted(largest, key=lambda place: (-flat[place], place)):
            row, group = (int(n) for n in np.unravel_index(place, self.error.shape))
            columns = (group * group_size, (group + 1) * group_size - 1)
            share = float(flat[place]) / total
            groups.append(Group(row, columns, float(scales[row, group]), share, float(relative[row, group])))
        return tuple(groups)


def cell_errors(levels: Floats, boundaries: Sequence[float]) -> Floats:
    """The mean squared distance of a level to the points of its cell; the outer cells end at -1 and 1."""
    below = levels - np.array([-1.0, *boundaries])
    above = np.array([*boundaries, 1.0]) - levels
    return np.asarray((below**3 + above**3) / (3 * (below + above)))


LEVELS: Floats = np.array(codebook(), np.float64)

CELL_ERRORS = cell_errors(LEVELS, boundaries())


def entropy_of(counts: Sequence[int]) -> float:
    """Bits of information in an index, from how often each level is used; 4 if all are used alike."""
    shares = np.array(counts) / max(1, sum(counts))
    used = shares[shares > 0]
    return float(-(used * np.log2(used)).sum()) + 0.0


@dataclass(frozen=True)
class Nf4Numbers:
    """What is known of a tensor in NF4.

    Attributes:
        group_size: columns that share a scale.
        basis: where relative_rms comes from: "measured", "recorded" or "estimated".
        relative_rms: ||w - decoded|| / ||w||.
        cosine: between w and decoded; None if it was not measured.
        largest_error: the largest |w - decoded|; None if it was not measured.
        squared_norm: ||w||^2 if measured, else ||decoded||^2.
        indices: how often each of the 16 levels is used.
        scales: their smallest, median and largest magnitude.
        group_errors: how many groups have a relative error in each bin of ERROR_EDGES.
        worst: the groups that make the most of the squared error, the worst first; measured, else estimated.
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
        """Bits of information in an index."""
        return entropy_of(self.indices)


@np.errstate(invalid="ignore", over="ignore")  # a scale that another program wrote may be NaN or infinite
def measure(packed: Array, scales: Array, w: Tensor | None, recorded: float | None) -> Nf4Numbers:
    """Everything about a tensor in NF4.

    Args:
        packed, scales: (rows, d/2) uint8 and (rows, groups) float32.
        w: (rows, d), what it was made of, if that is known.
        recorded: the relative error that its converter measured, if it says so; used without w.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group_size = columns // scales.shape[1]
    errors = GroupErrors(scales.shape)
    indices = np.zeros(16, np.int64)
    for some in row_slices(rows, columns, AT_ONCE):
        used = unpack_indices(packed[some])
        indices += np.bincount(used.reshape(-1), minlength=16)
        if w is None:
            errors.add_estimated(some, used, scales[some])
        else:
            exact = to_numpy(w[some].double()).astype(np.float64, copy=False)
            decoded = dequantize_nf4(as_torch(packed[some]), as_torch(scales[some]), group_size).numpy()
            errors.add_measured(some, exact, decoded.astype(np.float64))
    basis: Basis = "measured" if w is not None else "estimated"
    relative_rms = errors.relative_rms
    if w is None and recorded is not None:
        basis, relative_rms = "recorded", recorded
    magnitudes = np.abs(scales)
    return Nf4Numbers(
        group_size=group_size,
        basis=basis,
        relative_rms=relative_rms,
        cosine=errors.cosine if w is not None else None,
        largest_error=errors.largest_error if w is not None else None,
        squared_norm=float(errors.norm.sum()),
        indices=tuple(int(n) for n in indices),
        scales=(float(magnitudes.min()), float(np.median(magnitudes)), float(magnitudes.max())) if rows else (0, 0, 0),
        group_errors=errors.histogram(),
        worst=errors.worst(scales, group_size),
    )
