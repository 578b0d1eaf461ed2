"""A stored tensor against the one it was made of: quantized again and compared byte for byte, or value for value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from squish_nf4.checkpoint.audit.compare import TILE, Differences, compare_nf4, differing
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.values import WIDENED, dtype_name, row_slices, to_numpy
from squish_nf4.ops import quantize_nf4


def compare_with_source(w: Tensor, stored: StoredTensor, record: Mapping[str, Any]) -> str | None:
    """What is wrong, in words; None if stored is what the source's tensor w becomes."""
    if tuple(w.shape) != stored.shape:
        return f"has shape {stored.shape}; the source has {tuple(w.shape)}"
    recorded = record.get("source_dtype", dtype_name(w.dtype))
    if recorded != dtype_name(w.dtype):
        return f"is recorded to have been {recorded}; the source has {dtype_name(w.dtype)}"
    return compare_quantized(w, stored) if stored.kind == "nf4" else compare_kept(w, stored)


def compare_quantized(w: Tensor, stored: StoredTensor) -> str | None:
    if not w.is_floating_point():
        return f"is in NF4; the source has {dtype_name(w.dtype)}"
    packed, scales = stored.load_nf4()
    matrix = w.reshape(stored.matrix_shape)
    for rows in row_slices(matrix.shape[0], matrix.shape[1], TILE):
        tile = matrix[rows].float() if w.dtype in WIDENED else matrix[rows]
        made = tuple(t.numpy() for t in quantize_nf4(tile, stored.group_size or 1))
        for found in compare_nf4((packed[rows], scales[rows]), (made[0], made[1]), stored.shape, rows.start):
            return describe(found)
    return None


def compare_kept(w: Tensor, stored: StoredTensor) -> str | None:
    values, wanted = stored.kept().reshape(-1), w.reshape(-1)
    for start in range(0, values.size, TILE):
        expected = to_numpy(wanted[start : start + TILE])
        tile = values[start : start + TILE]
        if (tile.dtype.kind, expected.dtype.kind) != ("f", "f") and tile.dtype != expected.dtype:
            return f"is stored as {tile.dtype}; the source has {expected.dtype}"
        with np.errstate(over="ignore", invalid="ignore"):
            found = tile.astype(expected.dtype)
        differ = differing(found, expected)
        if expected.dtype.kind in "fc":
            differ &= ~(np.isnan(found) & np.isnan(expected))  # any NaN is NaN
        if differ.any():
            place = int(np.flatnonzero(differ)[0])
            at = ", ".join(str(int(n)) for n in np.unravel_index(start + place, stored.shape))
            return f"[{at}] is {found[place]}; the source has {expected[place]}"
    return None


def describe(found: Differences) -> str:
    place = found.first[0]
    at = ", ".join(map(str, place.at))
    if found.what == "scale":
        return f"row {place.at[0]}, group {place.at[1]} has the scale {place.a!r}; the source gives {place.b!r}"
    return (
        f"[{at}] is stored as index {place.a:.0f} ({place.value_a:.6g}); the source gives {place.b:.0f} "
        f"({place.value_b:.6g})"
    )
