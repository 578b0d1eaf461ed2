"""Where two stored tensors differ, bit for bit: how often, and the first few places with what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from squish_nf4 import _C
from squish_nf4.checkpoint.values import Array, row_slices

What = Literal["index", "scale", "value"]

FIRST_FEW = 5
TILE = 2**20  # elements looked at in one step


@dataclass(frozen=True)
class Place:
    """One element of two tensors. at: its position in the tensor's shape, for a scale (row, group) of the matrix.

    a, b: the indices of a nibble, the scales, or the values; value_a and value_b: the weights that they stand for.
    """

    at: tuple[int, ...]
    a: float
    b: float
    value_a: float
    value_b: float


@dataclass
class Differences:
    """Of one kind between two tensors of one shape."""

    what: What
    count: int = 0
    first: list[Place] = field(default_factory=list)

    @property
    def room(self) -> int:
        return FIRST_FEW - len(self.first)


def compare_nf4(
    a: tuple[Array, Array], b: tuple[Array, Array], shape: Sequence[int], first_row: int = 0
) -> list[Differences]:
    """Of two (packed, scales) pairs of the same shapes, some rows of a tensor; the kinds that there are.

    shape: the tensor's, to say where. first_row: the first of these rows, counted over all leading dimensions.
    """
    found = [Differences("index"), Differences("scale")]
    group_size = 2 * a[0].shape[1] // a[1].shape[1]
    for rows in row_slices(len(a[0]), a[0].shape[1], TILE):
        tile_a, tile_b = (a[0][rows], a[1][rows]), (b[0][rows], b[1][rows])
        compare_indices(tile_a, tile_b, group_size, shape, first_row + rows.start, found[0])
        compare_scales(tile_a[1], tile_b[1], first_row + rows.start, found[1])
    return [differences for differences in found if differences.count]


def compare_indices(
    a: tuple[Array, Array],
    b: tuple[Array, Array],
    group_size: int,
    shape: Sequence[int],
    first_row: int,
    found: Differences,
) -> None:
    levels = np.array(_C.codebook(), np.float32)
    rows, at_bytes = np.nonzero(a[0] != b[0])
    nibbles_a, nibbles_b = (nibbles(packed[rows, at_bytes]) for packed, _ in (a, b))
    differ = nibbles_a != nibbles_b
    found.count += int(differ.sum())
    for place, half in np.argwhere(differ)[: found.room]:
        row, column = int(rows[place]), int(2 * at_bytes[place] + half)
        i, j = int(nibbles_a[place, half]), int(nibbles_b[place, half])
        values = [float(levels[n] * s[row, column // group_size]) for n, (_, s) in ((i, a), (j, b))]
        at = np.unravel_index((first_row + row) * 2 * a[0].shape[1] + column, shape)
        found.first.append(Place(tuple(int(n) for n in at), i, j, *values))


def nibbles(packed: Array) -> NDArray[np.uint8]:
    """(n,) bytes to (n, 2) indices, the even column first."""
    numbers = packed.astype(np.uint8, copy=False)
    return np.stack([numbers & 15, numbers >> 4], axis=-1)


def compare_scales(a: Array, b: Array, first_row: int, found: Differences) -> None:
    places = np.argwhere(differing(a, b))
    found.count += len(places)
    for row, group in places[: found.room]:
        scales = a[row, group].item(), b[row, group].item()
        found.first.append(Place((first_row + int(row), int(group)), *scales, *scales))


def compare_values(a: Array, b: Array) -> list[Differences]:
    """Of two arrays of one shape and dtype."""
    found = Differences("value")
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, TILE):
        places = start + np.flatnonzero(differing(flat_a[start : start + TILE], flat_b[start : start + TILE]))
        found.count += len(places)
        for place in places[: found.room]:
            at = tuple(int(n) for n in np.unravel_index(place, a.shape))
            values = flat_a[place].item(), flat_b[place].item()
            found.first.append(Place(at, *values, *values))
    return [found] if found.count else []


def differing(a: Array, b: Array) -> NDArray[np.bool_]:
    """Elementwise, by bits: -0.0 is not 0.0, and a NaN is itself."""
    word = np.dtype(f"u{min(8, a.dtype.itemsize)}")
    unequal = np.ascontiguousarray(a).view(word) != np.ascontiguousarray(b).view(word)
    return np.asarray(unequal.reshape(*a.shape, -1).any(axis=-1))
