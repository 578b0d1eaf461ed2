"""The squared errors of NF4 group by group: measured against the weights, or estimated from their indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squish_nf4 import _C
from squish_nf4.checkpoint.values import Array

Floats = NDArray[np.float64]

WORST = 5
ERROR_EDGES = np.linspace(0, 0.25, 51)  # bins of the relative errors of groups; the last holds what is beyond


@dataclass(frozen=True)
class Group:
    """Neighbouring columns of one row. share: of the tensor's squared error. relative_rms: within the group."""

    row: int
    columns: tuple[int, int]  # first and last
    scale: float
    share: float
    relative_rms: float


class GroupErrors:
    """Squared errors and norms of each group, and what is needed of the whole. shape: that of the scales."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.error: Floats = np.zeros(shape)
        self.norm: Floats = np.zeros(shape)
        self.product = self.decoded_norm = self.largest_error = 0.0

    def by_group(self, values: Floats) -> Floats:
        """(rows, columns) summed within groups."""
        return np.asarray(values.reshape(len(values), self.error.shape[1], -1).sum(axis=2))

    def measure(self, tile: slice, exact: Floats, decoded: Floats) -> None:
        difference = exact - decoded
        self.error[tile] = self.by_group(difference**2)
        self.norm[tile] = self.by_group(exact**2)
        self.product += float((exact * decoded).sum())
        self.decoded_norm += float((decoded**2).sum())
        self.largest_error = max(self.largest_error, float(np.abs(difference).max(initial=0)))

    def estimate(self, tile: slice, indices: NDArray[np.uint8], scales: Array) -> None:
        squared = scales.astype(np.float64) ** 2
        flat = indices.reshape(len(indices), -1)
        cells = CELL_ERRORS[flat]
        exact = cells.reshape(len(cells), self.error.shape[1], -1).max(axis=2)  # the outer cells are the widest
        self.error[tile] = (self.by_group(cells) - exact) * squared
        self.norm[tile] = self.by_group(LEVELS[flat] ** 2) * squared

    @property
    def relative_rms(self) -> float:
        norm = float(self.norm.sum())
        return math.sqrt(float(self.error.sum()) / norm) if norm else 0.0

    @property
    def cosine(self) -> float:
        norms = math.sqrt(float(self.norm.sum()) * self.decoded_norm)
        return self.product / norms if norms else 1.0

    @property
    def relative(self) -> Floats:
        """Errors of the groups; 0 for a group of zeros."""
        return np.sqrt(np.divide(self.error, self.norm, out=np.zeros_like(self.error), where=self.norm > 0))

    def histogram(self) -> tuple[int, ...]:
        inside = np.minimum(self.relative, ERROR_EDGES[-1])
        return tuple(int(n) for n in np.histogram(inside, ERROR_EDGES)[0])

    def worst(self, scales: Array, group_size: int) -> tuple[Group, ...]:
        """Of those that have an error at all."""
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


LEVELS: Floats = np.array(_C.codebook(), np.float64)
CELL_ERRORS = cell_errors(LEVELS, _C.boundaries())
