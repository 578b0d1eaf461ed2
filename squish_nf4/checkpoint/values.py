"""Arrays without loss: between torch and numpy, in the smallest dtype that holds every value, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

# Values in a block: what a thread looks at in one step. Copies in wider types then stay in a cache, and torch keeps to
# the calling thread: the stretches of a tensor have threads of their own (conversion/stream.py).
BLOCK = 2**15

MOST_DIMENSIONS = 64  # numpy's own limit

# Floats that numpy has no type for. Every one of their values is a float32.
WIDENED = {
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as reports and squish_nf4.json write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The inverse of dtype_name. ValueError: torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r:.100} is no dtype")
    return dtype


def to_numpy(tensor: Tensor) -> Array:
    """The tensor's values, contiguous; floats numpy lacks become float32. TypeError: numpy cannot hold the dtype."""
    tensor = tensor.float() if tensor.dtype in WIDENED else tensor
    return np.asarray(tensor.numpy(force=True), order="C")


def smallest_lossless(values: Array) -> Array:
    """values in their smallest_dtype."""
    return in_dtype(values, smallest_dtype(values))


def smallest_dtype(values: Array) -> np.dtype[np.generic]:
    """float16 or float32 if that loses nothing, else values' own; integers, bool and complex keep theirs.

    Of a tensor looked at in stretches it is the widest of theirs: float16 lies in float32, and that in float64.
    """
    if values.dtype.kind == "f":
        for dtype in (np.dtype(np.float16), np.dtype(np.float32)):
            if dtype.itemsize < values.itemsize and survives(values, dtype):
                return dtype
    return values.dtype


def in_dtype(values: Array, dtype: np.dtype[np.generic]) -> Array:
    """values in another dtype, without a copy if it is theirs."""
    with np.errstate(invalid="ignore"):  # a signaling NaN becomes a quiet one
        return values.astype(dtype, copy=False)


def survives(values: Array, dtype: np.dtype[np.generic]) -> bool:
    """Whether every value comes back from dtype as it was. -0.0 is not 0.0; any NaN is NaN, whatever its payload.

    Bits are compared, not values: where the process flushes subnormals to zero, a lost subnormal would equal 0.
    """
    bits = np.dtype(f"u{values.itemsize}")
    flat = values.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            back = block.astype(dtype).astype(values.dtype)
        if not np.all((back.view(bits) == block.view(bits)) | (np.isnan(back) & np.isnan(block))):
            return False
    return True


def rows_at_once(columns: int, values: int) -> int:
    """The number of whole rows that hold about so many values, one at least."""
    return max(1, values // max(1, columns))


def row_slices(rows: int, columns: int, values: int) -> Iterator[slice]:
    """The rows of a matrix, some whole ones at a time: about so many values, so that copies of them stay small."""
    step = rows_at_once(columns, values)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
