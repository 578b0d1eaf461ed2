"""When two results are equal: to the bit, or up to what rounding explains. Nothing here knows how they were made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squish_nf4.torchscript.trial_program import Leaves

# What rounding may do to a value, relative to the magnitude nearby, where an export computes in another order.
ROUNDING = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.complex128: 1e-9,
    torch.complex64: 1e-5,
}
ENOUGH_NEIGHBOURS = 3  # along a dimension: the largest of fewer may be close to zero by chance


@dataclass(frozen=True)
class Comparison:
    """How one result compares with another.

    Attributes:
        same_bits: everything is equal, bit for bit.
        difference: the largest |found - expected|.
        misfit: what is wrong, in words, where the difference is more than rounding.
    """

    same_bits: bool = True
    difference: float = 0.0
    misfit: str | None = None

    def __and__(self, other: Comparison) -> Comparison:
        """What holds for two comparisons together; the first misfit counts."""
        return Comparison(
            self.same_bits and other.same_bits, max(self.difference, other.difference), self.misfit or other.misfit
        )


def mismatch(why: str) -> Comparison:
    """The comparison of results that are not equal for a reason no number says."""
    return Comparison(False, math.inf, why)


def compare(found: Leaves | str, expected: Leaves) -> Comparison:
    """Compare two flat results; ``found`` is the text of an error where there is none."""
    if isinstance(found, str):
        return mismatch(found)
    if [place for place, _ in found] != [place for place, _ in expected]:
        places = [", ".join(f"result{place}" for place, _ in leaves) or "nothing" for leaves in (found, expected)]
        return mismatch(f"it returns {places[0]}; eager returns {places[1]}")
    comparison = Comparison()
    for (place, value), (_, wanted) in zip(found, expected, strict=True):
        try:
            comparison &= compare_values(f"result{place}", value, wanted)
        except Exception as error:  # a kind of tensor that torch's arithmetic does not take
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            comparison &= mismatch(f"result{place} cannot be compared with eager's: {said}")
    return comparison


def compare_values(name: str, value: Any, wanted: Any) -> Comparison:
    if not isinstance(value, Tensor) or not isinstance(wanted, Tensor):
        equal = type(value) is type(wanted) and (value == wanted or (value != value and wanted != wanted))  # NaN
        return Comparison() if equal else mismatch(f"{name} is {value!r}; eager gives {wanted!r}")
    if (value.dtype, value.shape, value.layout) != (wanted.dtype, wanted.shape, wanted.layout):
        return mismatch(f"{name} is {kind_of(value)}; eager gives {kind_of(wanted)}")
    if value.layout != torch.strided:
        value, wanted = value.to_dense(), wanted.to_dense()
    if have_same_bits(value, wanted):
        return Comparison()
    difference = differences(value, wanted)
    largest = float(difference.max())
    allowed = ROUNDING.get(wanted.dtype)  # bools and integers are not rounded
    if allowed is None or bool((difference > allowed * magnitude_nearby(wanted)).any()):
        return Comparison(False, largest, f"{name} differs from eager by up to {largest:.3g}")
    return Comparison(False, largest)


def kind_of(t: Tensor) -> str:
    """Layout, dtype and shape, as a misfit names them."""
    layout = "" if t.layout == torch.strided else f"{t.layout} "
    return f"{layout}{t.dtype} {tuple(t.shape)}"


def have_same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal bit for bit, NaN and -0.0 too."""
    return torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(t: Tensor) -> Tensor:
    """The bytes of a tensor, flat. A dimension of size 1 may have any stride, which view() alone would refuse."""
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)


def in_double(t: Tensor) -> Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def differences(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of each element: 0 where both are NaN or the same infinity, inf where only one is."""
    first, second = in_double(a), in_double(b)
    difference = (first - second).abs().nan_to_num(nan=math.inf)
    return difference.masked_fill((first == second) | (first.isnan() & second.isnan()), 0.0)


def magnitude_nearby(t: Tensor) -> Tensor:
    """For each element the largest finite magnitude of its row, of its column and so on, whichever is the least.

    Rounding makes errors of the size of what was added up, which its neighbours show. The largest of the whole tensor
    would hide a wrong column beside one of large values.
    """
    values = in_double(t).abs()
    values = values.masked_fill(~values.isfinite(), 0.0)
    nearby = values.max()
    for dimension in range(t.dim()):
        if t.size(dimension) >= ENOUGH_NEIGHBOURS:
            nearby = torch.minimum(nearby, values.amax(dimension, keepdim=True))
    return nearby
