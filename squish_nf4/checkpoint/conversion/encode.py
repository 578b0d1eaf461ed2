"""Rows of a checkpoint's tensor in NF4, or the reason to keep the tensor as it is. No files here.

A tensor may come in stretches: rows in multiples of rows_at_once(d, BLOCK), one stretch after the other. What comes out
does not depend on how it was cut, nor on who looked at which stretch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squish_nf4.checkpoint.conversion.devices import CPU, failures_of, moved
from squish_nf4.checkpoint.conversion.options import ConvertOptions, Limits
from squish_nf4.checkpoint.messages import shorten
from squish_nf4.checkpoint.values import BLOCK, WIDENED, Array, dtype_name, row_slices, smallest_lossless, to_numpy
from squish_nf4.layout import pick_group_size
from squish_nf4.ops import RowSurvey, relative_error, survey_nf4

Kind = Literal["nf4", "kept"]

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

Floats = NDArray[np.float64]

OPERATORS_TAKE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
QUANTIZED = {torch.float64, torch.float32, torch.float16} | WIDENED - {torch.float8_e8m0fnu}  # that one holds scales


@dataclass(frozen=True)
class Survey:
    """What the values of some rows say about quantizing their tensor.

    outlier: the largest max|w| / (mean|w| + 1e-8) of a row, in float32, and that row.
    peak: the largest max|w| / mean|w| of a row, and that row.
    """

    outlier: tuple[float, int] = (0.0, 0)
    peak: tuple[float, int] = (0.0, 0)
    beyond_float32: bool = False

    def joined(self, later: Survey) -> Survey:
        """The survey of these rows and of later ones; of equal ratios the first row counts."""
        return Survey(
            max(self.outlier, later.outlier, key=lambda found: found[0]),
            max(self.peak, later.peak, key=lambda found: found[0]),
            self.beyond_float32 or later.beyond_float32,
        )

    def reason_to_keep(self, limits: Limits) -> str | None:
        """The sentence that says why the tensor is kept; None if no value speaks against NF4."""
        if self.beyond_float32:
            return "holds values beyond float32"
        if self.peak[0] > limits.super_weight:
            return f"super weight in row {self.peak[1]} (max|w| is {self.peak[0]:.1f} times mean|w|)"
        if self.outlier[0] > limits.outlier:
            return (
                f"outlier row {self.outlier[1]} (max|w| is {self.outlier[0]:.1f} times mean|w|, "
                f"threshold {limits.outlier:g})"
            )
        return None


@dataclass(frozen=True)
class EncodedRows:
    """Some rows in NF4. packed (rows, d/2) and scales (rows, d/group_size) are None if the survey says to keep them.

    squares: per block of rows, the squared norms of what was lost and of what was there, in float64.
    """

    survey: Survey
    packed: Array | None
    scales: Array | None
    squares: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class KeptValues:
    """What some values of a kept tensor ask of the dtype it is kept in, and whether all of them are finite."""

    dtype: np.dtype[np.generic]
    finite: bool


def reason_by_header(name: str, dtype: torch.dtype, shape: Sequence[int], options: ConvertOptions) -> str | None:
    """Why a tensor is kept, as far as its name, dtype and shape tell; None: its values decide."""
    if found := options.passed_through_by(name):
        return f"on passthrough ({found})"
    if not dtype.is_floating_point:
        return f"{dtype_name(dtype)} is not a floating-point type"
    if dtype not in QUANTIZED:
        return f"{dtype_name(dtype)} is not a type of weights"
    if len(shape) < 2:
        return f"{len(shape)}-D"
    if math.prod(shape) == 0:
        return "empty"
    if shape[-1] % 2:
        return f"odd number of columns ({shape[-1]})"
    return None


def group_size_for(d: int, wanted: int | None) -> int:
    """The group size of a tensor of d columns: the wanted one where it divides them, else pick_group_size's."""
    return wanted if wanted and d % wanted == 0 else pick_group_size(d)


def encode_rows(
    name: str, first_row: int, w: Tensor, group_size: int, limits: Limits, device: torch.device = CPU
) -> EncodedRows:
    """w (rows, d), on the CPU, in NF4, unless a value among them speaks against it. What comes out is on the CPU, too.

    Raises:
        ValueError: a weight is NaN or infinite. first_row and name are for the message.
        OSError: the device fails, or has no memory left.
    """
    rows, d = w.shape
    packed = np.empty((rows, d // 2), dtype=np.uint8)
    scales = np.empty((rows, d // group_size), dtype=np.float32)
    survey = Survey()
    squares: list[tuple[float, float]] = []
    for at, found in looks(w, group_size, device, torch.from_numpy(packed), torch.from_numpy(scales)):
        survey = survey.joined(survey_of(name, first_row + at.start, w[at], found))
        squares.append((float(found.squared_error.numpy().sum()), float(found.square.numpy().sum())))
    fits = survey.reason_to_keep(limits) is None
    return EncodedRows(survey, packed if fits else None, scales if fits else None, squares)


def looks(
    w: Tensor, group_size: int, device: torch.device, packed: Tensor, scales: Tensor
) -> Iterator[tuple[slice, RowSurvey]]:
    """(place, what is found) of each block of rows, whose NF4 goes to packed and scales.

    A CPU takes them one by one, in its cache; a GPU all at once.
    """
    if device.type == "cpu":
        for at, block in blocks(w):
            yield at, look(block, group_size, packed[at], scales[at])
        return
    with failures_of(device):
        found = look(moved(w, device), group_size, packed, scales)
    for at, _ in blocks(w):
        yield at, found.rows(at)


def look(w: Tensor, group_size: int, packed: Tensor, scales: Tensor) -> RowSurvey:
    """Quantizes w where it is, copies that to packed and scales, and says what its rows are like.

    By the bare operator: what is not finite is found in the survey.
    """
    values = w if w.dtype in OPERATORS_TAKE else w.float()
    own_packed, own_scales = torch.ops.squish.quantize_nf4(values, group_size)
    packed.copy_(own_packed)
    scales.copy_(own_scales)
    return survey_nf4(values, own_packed, own_scales, group_size)


def survey_of(name: str, first_row: int, w: Tensor, rows: RowSurvey) -> Survey:
    """Refuses the non-finite. A row of float64 whose largest value float32 holds as a subnormal or 0 is beyond it."""
    largest, sums = rows.largest.numpy(), rows.sum.numpy()
    if not np.isfinite(largest).all():
        refuse_non_finite_rows(name, first_row, w)
        return Survey(beyond_float32=True)  # finite, but only as float64
    if w.dtype == torch.float64 and bool(w[torch.from_numpy(largest < SMALLEST_NORMAL)].count_nonzero()):
        return Survey(beyond_float32=True)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        magnitude, mean = largest.astype(np.float32), (sums / w.shape[1]).astype(np.float32)
        outliers = magnitude / (mean + np.float32(1e-8))
        peaks = np.where(mean > 0, magnitude / mean, 0)
    outlier, peak = int(outliers.argmax()), int(peaks.argmax())
    return Survey((float(outliers[outlier]), first_row + outlier), (float(peaks[peak]), first_row + peak))


def refuse_non_finite_rows(name: str, first_row: int, w: Tensor) -> None:
    """Raises ValueError if w, in its own dtype, holds NaN or infinity; says where."""
    for at, block in blocks(w):
        places = np.argwhere(~np.isfinite(to_numpy(block)))
        if len(places):
            row, column = (int(i) for i in places[0])
            raise ValueError(
                f"tensor {shorten(name)}: row {first_row + at.start + row}, column {column} is "
                f"{float(block[row, column])}; NF4 encodes finite weights only, and no large weight saves the tensor "
                "from that (one on passthrough is kept as it is)"
            )


def error_of_blocks(squares: Sequence[tuple[float, float]]) -> float:
    """The relative error of a tensor, of whose blocks these are (squared error, squared norm)."""
    return relative_error(math.fsum(lost for lost, _ in squares), math.fsum(norm for _, norm in squares))


def blocks(w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(place, those rows), few enough that copies in wider types stay small beside the tensor."""
    for rows in row_slices(w.shape[0], w.shape[1], BLOCK):
        yield rows, w[rows]


@dataclass(frozen=True)
class Encoded:
    """A whole tensor in the form it is stored in."""

    kind: Kind
    arrays: dict[str, Array]  # by file suffix: __nf4, __s_nf4, __shape, or __pt, __shape
    reason: str | None = None  # why it was kept
    group_size: int | None = None
    relative_error: float = 0.0


def encode(name: str, tensor: Tensor, options: ConvertOptions) -> Encoded:
    """A tensor in memory as a conversion would store it. ValueError: a weight that would be quantized is not finite."""
    tensor = tensor.detach().cpu()
    shape = {"__shape": np.array(tuple(tensor.shape), dtype=np.int64)}
    reason = reason_by_header(name, tensor.dtype, tensor.shape, options)
    if reason is None:
        w = tensor.reshape(-1, tensor.shape[-1])
        group_size = group_size_for(w.shape[1], options.group_size)
        limits = options.limits(name)
        rows = encode_rows(name, 0, w, group_size, limits)
        if rows.packed is not None and rows.scales is not None:
            arrays = {"__nf4": rows.packed, "__s_nf4": rows.scales, **shape}
            return Encoded("nf4", arrays, None, group_size, error_of_blocks(rows.squares))
        reason = rows.survey.reason_to_keep(limits)
    try:
        values = to_numpy(tensor)
    except TypeError as error:
        raise TypeError(f"tensor {shorten(name)}: numpy cannot hold {tensor.dtype}") from error
    return Encoded("kept", {"__pt": smallest_lossless(values), **shape}, reason)


def quantize_tensor(name: str, tensor: Tensor, **options: Any) -> dict[str, Array]:
    """The arrays that a squish directory stores for one tensor, by file suffix.

    Args:
        name: the tensor's name, for passthrough, include and messages.
        tensor: (..., d), any shape and dtype that numpy can hold; floats that it cannot are widened without loss.
        options: the fields of ConvertOptions. group_size has to divide d here; ultra changes no array.

    Returns:
        {"__nf4": (rows, d/2) uint8, "__s_nf4": (rows, d/group_size) float32, "__shape": (ndim,) int64}, rows being the
        product of the leading dimensions; or {"__pt", "__shape"} for a tensor that is kept, which is then exact.

    Raises:
        ValueError: a weight is NaN or infinite, an option is wrong, or group_size does not divide d.
        TypeError: tensor is none, its name is no string, numpy cannot hold the dtype, or there is no such option.
    """
    if not isinstance(name, str):
        raise TypeError(f"quantize_tensor: the name of a tensor must be a string, got {name!r:.100}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor {shorten(name)}: a torch tensor is wanted, got {type(tensor).__name__}")
    chosen = ConvertOptions.named(quantize_tensor, options)
    encoded = encode(name, tensor, chosen)
    if chosen.group_size and encoded.group_size not in (None, chosen.group_size):
        raise ValueError(
            f"tensor {shorten(name)} has {tensor.shape[-1]} columns, not a multiple of group_size={chosen.group_size}"
        )
    return encoded.arrays
