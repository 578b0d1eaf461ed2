"""The operators as plain functions. They add docstrings, types and the refusal of non-finite weights; every byte is
made in C++ (``torch.ops.squish``)."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations, biases and decoded weights


def quantize_nf4(w: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Encode a weight matrix at 4 bits per weight plus one float32 scale per group.

    NF4 is from QLoRA (Dettmers et al., arXiv 2305.14314); docs/numerics.md states the arithmetic.

    Args:
        w: (n, d) float32, bfloat16, float16 or float64 (rounded to float32 first), finite, any strides; d is even.
        group_size: neighbouring columns that share a scale; divides d.

    Returns:
        packed: (n, d/2) uint8; column 2j is the low nibble of byte j, column 2j+1 the high one.
        scales: (n, d/group_size) float32; the largest magnitude of the group, or 1 if the group is all zero.
        Neither requires grad, whatever w does.

    Raises:
        ValueError: w is not 2-D, d is odd, group_size does not divide d, or w holds NaN or infinity.
        TypeError: w is not of one of the four dtypes.
    """
    packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
    refuse_non_finite("quantize_nf4: w", w, scales)
    return packed, scales


def dequantize_nf4(packed: Tensor, scales: Tensor, group_size: int = 32, *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a weight matrix: level times scale in float32, rounded once more for a 16-bit ``dtype``.

    Args:
        packed: (n, d/2) uint8, as quantize_nf4 returns it.
        scales: (n, d/group_size) float32, any sign.
        group_size: columns that share a scale.
        dtype: float32 (the default), bfloat16 or float16.

    Returns:
        (n, d) in ``dtype``. To decode into a tensor of your own: ``torch.ops.squish.dequantize_nf4.out(..., out=t)``.

    Raises:
        ValueError: the shapes of packed and scales do not fit each other and group_size.
        TypeError: packed is not uint8, scales are not float32, or dtype is another one.
        RuntimeError: packed and scales are on different devices.
    """
    result: Tensor = torch.ops.squish.dequantize_nf4(packed, scales, group_size, dtype=dtype)
    return result


def linear_nf4(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, group_size: int = 32) -> Tensor:
    """``x @ W.T + bias`` with the W that packed and scales decode to, accumulated in float32, rounded once.

    Gradients flow to x and bias. No dense W is kept, neither for the result nor for the backward.

    Args:
        x: (..., d) float32, bfloat16 or float16. d is the packed columns, or fewer by less than lcm(2, group_size):
            then the last columns are padding, which must hold zeros.
        packed: (n, columns/2) uint8.
        scales: (n, columns/group_size) float32.
        bias: (n,) float32, bfloat16 or float16, or None; added in float32.
        group_size: columns that share a scale.

    Returns:
        (..., n) in the dtype of x.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not.
        RuntimeError: the devices differ.
    """
    result: Tensor = torch.ops.squish.linear_nf4(x, packed, scales, bias, group_size)
    return result


class RowSurvey(NamedTuple):
    """What survey_nf4 says of each row, (n,) float64 each, on the CPU.

    largest, sum: of |w|. square: the squared norm of w. squared_error: that of w minus what it becomes.
    """

    largest: Tensor
    sum: Tensor
    square: Tensor
    squared_error: Tensor

    def rows(self, at: slice) -> RowSurvey:
        """Of some of the rows."""
        return RowSurvey(*(numbers[at] for numbers in self))


def survey_nf4(w: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> RowSurvey:
    """Look once at the rows of a weight and at what they become in NF4; w may lack columns that packed has as padding.

    Args:
        w: (n, d) float32, bfloat16, float16 or float64.
        packed, scales: what quantize_nf4 made of w, padded with zeros.
        group_size: columns that share a scale.
    """
    return RowSurvey(*torch.ops.squish._survey_nf4(w, packed, scales, group_size).cpu().unbind(1))


def relative_error(squared_error: float, squared_norm: float) -> float:
    """||w - decoded|| / ||w||, of the squares of both norms; 0 for a weight of zeros."""
    return 0.0 if squared_norm == 0 else sqrt(squared_error / squared_norm)


def refuse_non_finite(what: str, w: Tensor, scales: Tensor) -> None:
    """Raise ValueError if a scale says that its group of ``w`` holds NaN or infinity; ``what`` names the tensor.

    Only where a look is possible and free of side effects. Under compile, export, FakeTensor, make_fx, torch.func, on
    meta and in stream capture there is no look, and the NaN scale marks the group.
    """
    if not may_look(scales) or not bool(scales.isnan().any()):
        return
    row, group = (int(i) for i in scales.isnan().nonzero()[0])
    group_size = w.size(1) // scales.size(1)
    values = w[row, group * group_size : (group + 1) * group_size].float()
    offset = int((~values.isfinite()).nonzero()[0])
    column = group * group_size + offset
    raise ValueError(
        f"{what} holds {w[row, column].item()} at row {row}, column {column}; NF4 encodes finite weights only"
    )


def may_look(tensor: Tensor) -> bool:
    """Whether the values are there and reading them has no side effect on a trace, a transform or a capture."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():  # torch.jit.trace; compile, export
        return False
    if tensor.is_meta:
        return False
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False  # FakeTensor and its like
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # make_fx, FakeTensorMode; torch.func transforms
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
