"""One tensor of a checkpoint as arrays: in NF4, or kept exactly, and why. No files here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from squish_nf4.checkpoint.lossless import TILE, WIDENED, Array, dtype_name, smallest_lossless, to_numpy
from squish_nf4.checkpoint.names import matching, shorten
from squish_nf4.layout import pick_group_size
from squish_nf4.ops import dequantize_nf4, quantize_nf4

Kind = Literal["nf4", "kept"]

DEFAULT_OUTLIER_THRESHOLD = 20.0
QUANTIZED = {torch.float64, torch.float32, torch.float16} | WIDENED - {torch.float8_e8m0fnu}  # that one holds scales


@dataclass(frozen=True)
class Encoded:
    """A tensor in the form it is stored in."""

    kind: Kind
    arrays: dict[str, Array]  # by file suffix: __nf4, __s_nf4, __shape, or __pt, __shape
    reason: str | None = None  # why it was kept
    group_size: int | None = None
    relative_error: float = 0.0  # ||w - dequantized|| / ||w||, in float64

    @property
    def stored_dtype(self) -> str:
        return "nf4" if self.kind == "nf4" else str(self.arrays["__pt"].dtype)

    @property
    def finite(self) -> bool:
        """Whether every value is; what is in NF4 always is."""
        return self.kind == "nf4" or bool(np.isfinite(self.arrays["__pt"]).all())

    @property
    def bits_per_weight(self) -> float:
        """Of the stored values, without file headers; 0 if there are none."""
        stored = sum(array.nbytes for suffix, array in self.arrays.items() if suffix != "__shape")
        return 8 * stored / max(1, int(self.arrays["__shape"].prod()))


def quantize_tensor(
    name: str,
    tensor: Tensor,
    *,
    group_size: int | None = None,
    outlier_threshold: float = DEFAULT_OUTLIER_THRESHOLD,
    passthrough: Sequence[str] = (),
) -> dict[str, Array]:
    """The arrays that a squish directory stores for one tensor, by file suffix.

    Args:
        name: the tensor's name, for passthrough and for messages.
        tensor: (..., d), any shape and dtype that numpy can hold; floats that it cannot are widened without loss.
        group_size: columns that share a scale; divides d. None: pick_group_size(d).
        outlier_threshold: a tensor is kept if in any row max|w| / (mean|w| + 1e-8) exceeds this.
        passthrough: names, parts of names or globs of tensors to keep as they are.

    Returns:
        {"__nf4": (rows, d/2) uint8, "__s_nf4": (rows, d/group_size) float32, "__shape": (ndim,) int64}, rows being the
        product of the leading dimensions; or {"__pt", "__shape"} for a tensor that is kept, which is then exact.

    Raises:
        ValueError: a weight is NaN or infinite, or group_size does not divide d.
        TypeError: numpy cannot hold the dtype.
    """
    check_options(group_size, outlier_threshold, passthrough)
    return encode(name, tensor, group_size, outlier_threshold, passthrough).arrays


def check_options(group_size: int | None, outlier_threshold: float, passthrough: Sequence[str]) -> None:
    if group_size is not None and not isinstance(group_size, int):
        raise TypeError(f"group_size must be a whole number, got {group_size!r}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if not outlier_threshold >= 0:  # NaN too
        raise ValueError(f"outlier_threshold must be 0 or more, got {outlier_threshold}")
    if isinstance(passthrough, str):
        raise TypeError(f"passthrough must be a list of names, got the string {passthrough!r}")
    if "" in passthrough:
        raise ValueError("passthrough holds an empty name, which is part of every name")


def encode(name: str, tensor: Tensor, group_size: int | None, threshold: float, passthrough: Sequence[str]) -> Encoded:
    """quantize_tensor with what a report wants to know. The options have been checked."""
    tensor = tensor.detach().cpu()
    reason = reason_to_keep(name, tensor, passthrough)
    if reason is None:
        w = tensor.reshape(-1, tensor.shape[-1])
        reason = survey(name, w, threshold)
    if reason is not None:
        return keep(name, tensor, reason)
    return to_nf4(name, w, tuple(tensor.shape), group_size or pick_group_size(w.shape[1]))


def reason_to_keep(name: str, tensor: Tensor, passthrough: Sequence[str]) -> str | None:
    """What can be told without looking at a value."""
    dtype = dtype_name(tensor.dtype)
    if found := matching(name, passthrough):
        return f"on passthrough ({found[0]})"
    if not tensor.is_floating_point():
        return f"{dtype} is not a floating-point type"
    if tensor.dtype not in QUANTIZED:
        return f"{dtype} is not a type of weights"
    if tensor.dim() < 2:
        return f"{tensor.dim()}-D"
    if tensor.numel() == 0:
        return "empty"
    if tensor.shape[-1] % 2:
        return f"odd number of columns ({tensor.shape[-1]})"
    return None


def survey(name: str, w: Tensor, threshold: float) -> str | None:
    """Looks at every value of w (rows, d): refuses the non-finite, gives the reason to keep w, or None."""
    largest, at_row, fits_float32 = 0.0, 0, True
    for first, tile in row_tiles(w):
        magnitudes = np.abs(to_numpy(tile.float()))
        if not np.isfinite(magnitudes).all():
            refuse_non_finite(name, first, tile)
            fits_float32 = False  # finite, but only as float64
            continue
        with np.errstate(over="ignore"):
            ratios = magnitudes.max(axis=1) / (magnitudes.mean(axis=1) + np.float32(1e-8))
        row = int(ratios.argmax())
        if ratios[row] > largest:
            largest, at_row = float(ratios[row]), first + row
    if not fits_float32:
        return "holds values beyond float32"
    if largest > threshold:
        return f"outlier row {at_row} (max|w| is {largest:.1f} times mean|w|, threshold {threshold:g})"
    return None


def refuse_non_finite(name: str, first_row: int, tile: Tensor) -> None:
    places = np.argwhere(~np.isfinite(to_numpy(tile)))
    if len(places):
        row, column = (int(i) for i in places[0])
        raise ValueError(
            f"tensor {shorten(name)}: row {first_row + row}, column {column} is {float(tile[row, column])}; "
            "NF4 encodes finite weights only (a tensor on passthrough is kept as it is)"
        )


def keep(name: str, tensor: Tensor, reason: str) -> Encoded:
    try:
        values = to_numpy(tensor)
    except TypeError as error:
        raise TypeError(f"tensor {shorten(name)}: numpy cannot hold {tensor.dtype}") from error
    return Encoded("kept", {"__pt": smallest_lossless(values), "__shape": shape_array(tensor.shape)}, reason)


def to_nf4(name: str, w: Tensor, shape: tuple[int, ...], group_size: int) -> Encoded:
    rows, d = w.shape
    if d % group_size:
        raise ValueError(f"tensor {shorten(name)} has {d} columns, not a multiple of group_size={group_size}")
    packed = np.empty((rows, d // 2), dtype=np.uint8)
    scales = np.empty((rows, d // group_size), dtype=np.float32)
    error = norm = 0.0
    for first, tile in row_tiles(w):
        tile_packed, tile_scales = quantize_nf4(tile.float() if tile.dtype in WIDENED else tile, group_size)
        packed[first : first + len(tile)] = tile_packed.numpy()
        scales[first : first + len(tile)] = tile_scales.numpy()
        # numpy's sums do not depend on the number of threads, so a directory written twice is the same twice.
        exact = tile.double().numpy()
        difference = exact - dequantize_nf4(tile_packed, tile_scales, group_size).double().numpy()
        error += float(np.square(difference).sum())
        norm += float(np.square(exact).sum())
    arrays: dict[str, Array] = {"__nf4": packed, "__s_nf4": scales, "__shape": shape_array(shape)}
    relative_error = math.sqrt(error / norm) if norm else 0.0
    return Encoded("nf4", arrays, group_size=group_size, relative_error=relative_error)


def row_tiles(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows), so that copies in wider types stay small beside the tensor."""
    step = max(1, TILE // max(1, w.shape[1]))
    for first in range(0, w.shape[0], step):
        yield first, w[first : first + step]


def shape_array(shape: Sequence[int]) -> Array:
    return np.array(tuple(shape), dtype=np.int64)
