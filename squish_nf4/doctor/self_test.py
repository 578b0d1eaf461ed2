"""Checks of the operators on this machine, against values that are not the library's own.

The formulas are written out here once more, on purpose. Each check returns a sentence on what held, or raises
WrongError with what did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import NormalDist

import torch
from torch import Tensor

from squish_nf4 import _C, ops

Check = Callable[[torch.device], str]


class WrongError(Exception):
    """A check found a value that it did not expect."""


def expect(holds: bool | Tensor, otherwise: str) -> None:
    """Raise WrongError with the sentence ``otherwise``, if a condition does not hold."""
    if not holds:
        raise WrongError(otherwise)


def levels(device: torch.device) -> Tensor:
    """The 16 levels of NF4, as the library has them."""
    return torch.tensor(_C.codebook(), dtype=torch.float32, device=device)


def gaussian(*shape: int, device: torch.device, seed: int = 1) -> Tensor:
    """Normal float32 numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def levels_are_quantiles(device: torch.device) -> str:
    """Derive NF4 as QLoRA does: 8 and 7 evenly spaced quantiles of the normal distribution, and 0; the last is 1."""
    tail, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(tail + (0.5 - tail) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(tail + (0.5 - tail) * i / 7) for i in range(7)]
    derived = [value / max(above) for value in sorted([*below, 0.0, *above])]
    worst = max(abs(level - value) for level, value in zip(_C.codebook(), derived, strict=True))
    expect(worst < 5e-7, f"a level is {worst:.1e} away from its quantile")
    return f"16 quantiles of the normal distribution, to {worst:.0e}"


def bytes_are_as_specified(device: torch.device) -> str:
    """Encode rows worked by hand: the levels in order, a group of zeros, and one that holds infinity."""
    row = levels(device)
    w = torch.stack([row, 0 * row, torch.where(row == 0, torch.inf, row)])
    packed, scales = torch.ops.squish.quantize_nf4(w, 16)  # ops.quantize_nf4 would refuse the infinity
    in_order = bytes.fromhex("1032547698badcfe")  # columns 0 and 1 in the low and high nibble of byte 0, and so on
    expect(bytes(packed[0].tolist()) == in_order, f"levels 0 to 15 were packed as {bytes(packed[0].tolist()).hex()}")
    expect(bytes(packed[1].tolist()) == b"\x77" * 8, "zeros were not packed as level 7")
    expect(scales[:2].tolist() == [[1.0], [1.0]], f"scales are {scales[:2].tolist()}, not 1")
    expect(scales[2].isnan().all(), "a group that holds infinity is not marked by a NaN scale")
    return "nibble order, zero group, infinity"


def exact_weights_come_back(device: torch.device) -> str:
    """Encode levels times powers of two, which lose nothing: every bit returns, at scales from tiny to huge."""
    exponents = range(-100, 127)
    generator = torch.Generator().manual_seed(2)
    for group_size in (2, 32, 48):
        columns = torch.randint(0, 16, (len(exponents), 2 * group_size), generator=generator)
        columns[:, ::group_size] = 15  # one level of magnitude 1 in each group: the group's scale
        scale = torch.tensor([math.ldexp(1.0, exponent) for exponent in exponents], dtype=torch.float32)
        w = levels(device)[columns.to(device)] * scale[:, None].to(device)
        packed, scales = ops.quantize_nf4(w, group_size)
        nibbles = columns.to(device, torch.uint8)
        expect(torch.equal(packed, nibbles[:, 0::2] | nibbles[:, 1::2] << 4), f"wrong bytes at group size {group_size}")
        expect(torch.equal(scales, scale[:, None].expand(-1, 2).to(device)), f"wrong scales at group size {group_size}")
        returned = ops.dequantize_nf4(packed, scales, group_size)
        expect(torch.equal(returned, w), f"not what went in at group size {group_size}")
    return f"{len(exponents)} scales from 2^-100 to 2^126"


def every_weight_takes_the_nearest_level(device: torch.device) -> str:
    """Encode normal weights of every dtype, beside the definition in plain torch; NF4's known error comes out."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w = gaussian(64, 512, device=device).to(dtype)
        packed, scales = ops.quantize_nf4(w, 32)
        groups = w.float().view(64, -1, 32)
        expected = groups.abs().amax(2)
        distances = (groups / expected[..., None]).unsqueeze(-1).sub(levels(device)).abs()
        index = distances.argmin(-1).view(64, 512).to(torch.uint8)
        expect(torch.equal(scales, expected), f"a scale of {dtype} weights is not the largest magnitude")
        expect(
            torch.equal(packed, index[:, 0::2] | index[:, 1::2] << 4), f"a {dtype} weight is not at its nearest level"
        )
    returned = ops.dequantize_nf4(packed, scales, 32)
    error = float((returned - w).norm() / w.norm())
    expect(0.084 < error < 0.090, f"the relative error of normal weights is {error:.4f}, not near 0.087")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = ops.dequantize_nf4(packed, scales, 32, dtype=dtype)
        expect(torch.equal(rounded, returned.to(dtype)), f"{dtype} is not the float32 result rounded once")
    return f"4 input and 3 output dtypes; relative error {error:.4f}"


def linear_equals_float64(device: torch.device) -> str:
    """Multiply few rows (the fused kernel) and many, in three dtypes; equal within what rounding explains."""
    packed, scales = ops.quantize_nf4(gaussian(96, 512, device=device), 64)
    w, bias = ops.dequantize_nf4(packed, scales, 64).double(), gaussian(96, device=device, seed=3)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 7, 300):
            x = gaussian(rows, 512, device=device, seed=rows).to(dtype)
            result = ops.linear_nf4(x, packed, scales, bias, 64).double()
            exact = x.double() @ w.T + bias
            bound = (x.double().abs() @ w.abs().T + bias.abs()) * max(torch.finfo(dtype).eps, 512 * 2.0**-24)
            expect(
                ((result - exact).abs() <= bound).all(), f"{rows} rows of {dtype} are farther off than rounding allows"
            )
            if dtype == torch.float32:
                worst = max(worst, float((result - exact).norm() / exact.norm()))
    return f"1, 7 and 300 rows in 3 dtypes; float32 to {worst:.0e}"


def gradient_equals_float64(device: torch.device) -> str:
    packed, scales = ops.quantize_nf4(gaussian(96, 256, device=device), 64)
    x = gaussian(5, 256, device=device, seed=4).requires_grad_()
    bias = gaussian(96, device=device, seed=5).requires_grad_()
    dy = gaussian(5, 96, device=device, seed=6)
    ops.linear_nf4(x, packed, scales, bias, 64).backward(dy)  # type: ignore[no-untyped-call]
    expected = (dy.double() @ ops.dequantize_nf4(packed, scales, 64).double()).float()
    expect(x.grad is not None and torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-3), "the gradient to x is wrong")
    expect(bias.grad is not None and torch.allclose(bias.grad, dy.sum(0), atol=1e-5), "the gradient to bias is wrong")
    return "to x and to bias"


def threads_change_nothing(device: torch.device) -> str:
    w, x = gaussian(257, 1024, device=device), gaussian(3, 1024, device=device, seed=7)
    results = []
    for threads in (1, max(2, torch.get_num_threads())):
        with number_of_threads(threads):
            packed, scales = ops.quantize_nf4(w, 64)
            decoded = ops.dequantize_nf4(packed, scales, 64)
            results.append((packed, scales, decoded, ops.linear_nf4(x, packed, scales, None, 64)))
    for name, one, many in zip(("packed bytes", "scales", "decoded weights", "linear"), *results, strict=True):
        expect(torch.equal(one, many), f"{name}: the result depends on the number of threads")
    return f"same bits with 1 and {threads}"


@contextmanager
def number_of_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_equals_cpu(device: torch.device) -> str:
    """Encode and decode weights of all magnitudes there and on the CPU: equal byte for byte."""
    magnitudes = torch.logspace(-38, 38, 500)[:, None]
    w = (gaussian(500, 960, device=torch.device("cpu"), seed=8).clamp(-3, 3) * magnitudes).clamp(-3e38, 3e38)
    for group_size in (2, 32, 64, 96):
        packed, scales = ops.quantize_nf4(w, group_size)
        there_packed, there_scales = ops.quantize_nf4(w.to(device), group_size)
        expect(
            torch.equal(packed, there_packed.cpu()), f"packed bytes differ from the CPU's at group size {group_size}"
        )
        expect(torch.equal(scales, there_scales.cpu()), f"scales differ from the CPU's at group size {group_size}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            here = ops.dequantize_nf4(packed, scales, group_size, dtype=dtype)
            there = ops.dequantize_nf4(there_packed, there_scales, group_size, dtype=dtype)
            same = torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
            expect(same, f"decoded {dtype} differs from the CPU's at group size {group_size}")
    return "byte for byte, 4 group sizes"


ON_EVERY_DEVICE: dict[str, Check] = {
    "bytes are as the format says": bytes_are_as_specified,
    "exact weights come back exactly": exact_weights_come_back,
    "every weight takes the nearest level": every_weight_takes_the_nearest_level,
    "linear agrees with float64": linear_equals_float64,
    "gradient agrees with float64": gradient_equals_float64,
}
ON_CPU: dict[str, Check] = {
    "levels are those of NF4": levels_are_quantiles,
    **ON_EVERY_DEVICE,
    "threads change nothing": threads_change_nothing,
}
ON_CUDA: dict[str, Check] = {**ON_EVERY_DEVICE, "CUDA equals CPU": device_equals_cpu}
