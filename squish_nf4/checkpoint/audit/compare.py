"""Where two tensors differ: two stored ones bit for bit, or a stored one from what its source becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from squish_nf4._C import codebook, unpack_indices
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.values import WIDENED, Array, dtype_name, row_slices, to_numpy
from squish_nf4.ops import quantize_nf4

What = Literal["index", "scale", "value"]

FIRST_FEW = 5

AT_ONCE = 2**20  # elements looked at in one step


@dataclass(frozen=True)
class Place:
    """One element in which two tensors differ.

    Attributes:
        at: its position in the tensor's shape; of a scale, its row and group.
        a: the index of a nibble, the scale or the value in one.
        b: the same in the other.
        value_a: the weight that a stands for.
        value_b: the weight that b stands for.
    """

    at: tuple[int, ...]
    a: float
    b: float
    value_a: float
    value_b: float


@dataclass
class Differences:
    """The differences of one kind between two tensors.

    Attributes:
        what: indices and scales of tensors in NF4, values of kept ones.
        count: how many there are.
        first: the first few places.
    """

    what: What
    count: int = 0
    first: list[Place] = field(default_factory=list)

    @property
    def room(self) -> int:
        return FIRST_FEW - len(self.first)


def compare_nf4(
    a: tuple[Array, Array], b: tuple[Array, Array], shape: Sequence[int], first_row: int = 0
) -> list[Differences]:
    """Compares two (packed, scales) pairs of the same shapes, some rows of a tensor; returns the kinds that there are.

    shape: the tensor's, to say where. first_row: the first of these rows, counted over all leading dimensions.
    """
    found = [Differences("index"), Differences("scale")]
    group_size = 2 * a[0].shape[1] // a[1].shape[1]
    for rows in row_slices(len(a[0]), a[0].shape[1], AT_ONCE):
        some_a, some_b = (a[0][rows], a[1][rows]), (b[0][rows], b[1][rows])
        compare_indices(some_a, some_b, group_size, shape, first_row + rows.start, found[0])
        compare_scales(some_a[1], some_b[1], first_row + rows.start, found[1])
    return [differences for differences in found if differences.count]


def compare_indices(
    a: tuple[Array, Array],
    b: tuple[Array, Array],
    group_size: int,
    shape: Sequence[int],
    first_row: int,
    found: Differences,
) -> None:
    levels = np.array(codebook(), np.float32)
    rows, at_bytes = np.nonzero(a[0] != b[0])
    indices_a, indices_b = (unpack_indices(packed[rows, at_bytes]) for packed, _ in (a, b))
    differ = indices_a != indices_b
    found.count += int(differ.sum())
    for place, half in np.argwhere(differ)[: found.room]:
        row, column = int(rows[place]), int(2 * at_bytes[place] + half)
        i, j = int(indices_a[place, half]), int(indices_b[place, half])
        values = [float(levels[n] * s[row, column // group_size]) for n, (_, s) in ((i, a), (j, b))]
        at = np.unravel_index((first_row + row) * 2 * a[0].shape[1] + column, shape)
        found.first.append(Place(tuple(int(n) for n in at), i, j, *values))


def compare_scales(a: Array, b: Array, first_row: int, found: Differences) -> None:
    places = np.argwhere(differing(a, b))
    found.count += len(places)
    for row, group in places[: found.room]:
        scales = a[row, group].item(), b[row, group].item()
        found.first.append(Place((first_row + int(row), int(group)), *scales, *scales))


def compare_arrays(a: Array, b: Array) -> list[Differences]:
    """Compares two arrays of one shape and dtype bit for bit; empty if they are equal."""
    found = Differences("value")
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, AT_ONCE):
        places = start + np.flatnonzero(differing(flat_a[start : start + AT_ONCE], flat_b[start : start + AT_ONCE]))
        found.count += len(places)
        for place in places[: found.room]:
            at = tuple(int(n) for n in np.unravel_index(place, a.shape))
            values = flat_a[place].item(), flat_b[place].item()
            found.first.append(Place(at, *values, *values))
    return [found] if found.count else []


def differing(a: Array, b: Array) -> NDArray[np.bool_]:
    """Which elements differ in their bits: -0.0 is not 0.0, and a NaN is itself."""
    word = np.dtype(f"u{min(8, a.dtype.itemsize)}")
    unequal = np.ascontiguousarray(a).view(word) != np.ascontiguousarray(b).view(word)
    return np.asarray(unequal.reshape(*a.shape, -1).any(axis=-1))


def compare_with_source(w: Tensor, stored: StoredTensor, record: Mapping[str, Any]) -> str | None:
    """What is wrong, in words; None if stored is what the source's tensor w becomes, to the byte or to the value."""
    if tuple(w.shape) != stored.shape:
        return f"has shape {stored.shape}; the source has {tuple(w.shape)}"
    recorded = record.get("source_dtype", dtype_name(w.dtype))
    if recorded != dtype_name(w.dtype):
        return f"is recorded to have been {recorded}; the source has {dtype_name(w.dtype)}"
    return compare_quantized(w, stored) if stored.kind == "nf4" else compare_kept(w, stored)


def compare_quantized(w: Tensor, stored: StoredTensor) -> str | None:
    """Quantizes w again, some rows at a time, and compares bytes."""
    if not w.is_floating_point():
        return f"is in NF4; the source has {dtype_name(w.dtype)}"
    packed, scales = stored.load_nf4()
    matrix = w.reshape(stored.matrix_shape)
    for rows in row_slices(matrix.shape[0], matrix.shape[1], AT_ONCE):
        some = matrix[rows].float() if w.dtype in WIDENED else matrix[rows]
        made = tuple(t.numpy() for t in quantize_nf4(some, stored.group_size or 1))
        for found in compare_nf4((packed[rows], scales[rows]), (made[0], made[1]), stored.shape, rows.start):
            return describe_first(found)
    return None


def compare_kept(w: Tensor, stored: StoredTensor) -> str | None:
    """Compares values, each in the dtype that numpy has for w."""
    values, wanted = stored.kept().reshape(-1), w.reshape(-1)
    for start in range(0, values.size, AT_ONCE):
        expected = to_numpy(wanted[start : start + AT_ONCE])
        kept = values[start : start + AT_ONCE]
        if (kept.dtype.kind, expected.dtype.kind) != ("f", "f") and kept.dtype != expected.dtype:
            return f"is stored as {kept.dtype}; the source has {expected.dtype}"
        with np.errstate(over="ignore", invalid="ignore"):
            found = kept.astype(expected.dtype)
        differ = differing(found, expected)
        if expected.dtype.kind in "fc":
            differ &= ~(np.isnan(found) & np.isnan(expected))  # any NaN is NaN
        if differ.any():
            place = int(np.flatnonzero(differ)[0])
            at = ", ".join(str(int(n)) for n in np.unravel_index(start + place, stored.shape))
            return f"[{at}] is {found[place]}; the source has {expected[place]}"
    return None


def describe_first(found: Differences) -> str:
    place = found.first[0]
    at = ", ".join(map(str, place.at))
    if found.what == "scale":
        return f"row {place.at[0]}, group {place.at[1]} has the scale {place.a!r}; the source gives {place.b!r}"
    return (
        f"[{at}] is stored as index {place.a:.0f} ({place.value_a:.6g}); the source gives {place.b:.0f} "
        f"({place.value_b:.6g})"
    )
