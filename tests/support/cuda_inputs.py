"""Weights and scales that a kernel may get wrong; made on the CPU, the same on every run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from squish_nf4 import _C
from tests.support import reference

GROUP_SIZES = (1, 2, 3, 4, 5, 8, 16, 24, 32, 33, 48, 50, 64, 96, 100, 128, 256, 1000, 4096)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLT_MAX = float(np.finfo(np.float32).max)
TINY = 2.0**-149


def columns(group_size: int, about: int) -> int:
    """A permitted number of columns near ``about``."""
    block = math.lcm(2, group_size)
    return max(about // block, 1) * block


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def shapes() -> Iterator[tuple[int, int, int]]:
    """(n, d, group_size): no rows, no columns, one group, tails, more rows than a block of threads takes."""
    for group_size in GROUP_SIZES:
        block = math.lcm(2, group_size)
        for d in sorted({0, block, 3 * block, columns(group_size, 1030)}):
            for n in (0, 1, 2, 7):
                yield n, d, group_size
    yield 4099, 64, 64
    yield 70_001, 2, 1
    yield 1, 1_000_000, 64
    yield 33, 8192, 64


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """(n, 192) tensors that are not simply contiguous."""
    values = normal(40 * 400, seed=2).to(dtype)
    matrix = values.view(40, 400)
    return {
        "every second row": matrix[::2, :192],
        "every second column": matrix[:, ::2][:, :192],
        "transposed": values[: 192 * 33].view(192, 33).t(),
        "columns in the middle": matrix[:, 101:293],
        "columns in the middle, aligned": matrix[:, 64:256],
        "storage from element 1": values[1 : 1 + 12 * 192].view(12, 192),
        "storage from element 2": values[2 : 2 + 12 * 192].view(12, 192),
        "storage from element 4": values[4 : 4 + 12 * 192].view(12, 192),
        "rows an odd number of elements apart": values.as_strided((30, 192), (193, 1)),
        "one row for all": values[:192].expand(9, 192),
        "one column for all": values[:9, None].expand(9, 192),
        "one value for all": values[:1].expand(9, 192),
        "rows that overlap": values.as_strided((11, 192), (3, 1)),
    }


def ulps_from(point: float, steps: int) -> np.float32:
    """The float ``steps`` floats away from zero (or towards it) from ``point``."""
    bits = np.float32(point).view(np.int32)
    return np.int32(bits + steps).view(np.float32)


def around_the_boundaries(exponents: range) -> Iterator[tuple[Tensor, int]]:
    """(w, group_size): quotients 3 ulp to each side of every boundary and level, under a scale of every exponent."""
    points = [*_C.boundaries(), *(float(level) for level in reference.LEVELS if 0 < abs(level) < 1)]
    quotients = np.array([ulps_from(point, steps) for point in points for steps in range(-3, 4)], dtype=np.float32)
    quotients = np.concatenate([quotients, quotients[: -len(quotients) % 64 - 1]])  # with the scale: whole groups of 64
    powers = np.ldexp(np.float32(1), np.array(exponents)).astype(np.float32)
    between = np.random.default_rng(3).uniform(1, 2, powers.size).astype(np.float32)
    for scales in (powers, powers * between, powers * np.float32(2 - 2**-23)):
        w = scales[:, None] * quotients
        w = np.concatenate([w, np.nextafter(w, np.float32(0)), np.nextafter(w, np.float32(np.inf))], axis=1)
        w = np.clip(w, -scales[:, None], scales[:, None])
        w = np.concatenate([w, w[:, : -w.shape[1] % 63]], axis=1)
        groups = w.reshape(len(scales), -1, 63)
        first = np.broadcast_to(scales[:, None, None], (len(scales), groups.shape[1], 1))
        yield torch.from_numpy(np.concatenate([first, groups], axis=2).reshape(len(scales), -1)), 64
        pairs = np.stack([np.broadcast_to(-scales[:, None], w.shape), w], axis=2)
        yield torch.from_numpy(pairs.reshape(len(scales), -1)), 2


def awkward_groups(group_size: int) -> Tensor:
    """Rows of one block each: zeros, subnormals, the largest floats, NaN and infinity at the ends of a group."""
    block = math.lcm(2, group_size)
    rows = np.random.default_rng(5).standard_normal((26, block)).astype(np.float32)
    last = group_size - 1
    rows[0], rows[1], rows[2] = 0, -0.0, np.where(rows[2] > 0, 0.0, -0.0)
    rows[3, 0], rows[4, last], rows[5, 0], rows[6, last] = np.nan, np.nan, np.inf, -np.inf
    rows[7].view(np.uint32)[0], rows[8].view(np.uint32)[last] = 0xFFC12345, 0x7F800001
    rows[9], rows[10], rows[11] = TINY, -TINY, np.where(rows[11] > 0, TINY, -0.0)
    rows[12] *= np.float32(1e-40)
    rows[13] *= np.float32(2.0**-126)
    rows[14, last], rows[15] = FLT_MAX, -FLT_MAX
    rows[16] = np.clip(rows[16], -1, 1) * np.float32(FLT_MAX)
    rows[17] *= np.float32(2.0**-100)
    rows[18] *= np.float32(2.0**98)
    rows[19], rows[19, last] = 0, TINY
    rows[20], rows[21] = 1, -1
    rows[22, 0] = 1e30
    rows[23, last] = -1e30
    rows[24], rows[24, 0] = np.nan, np.inf
    return torch.from_numpy(np.concatenate([rows, rows[::-1], rows[[3, 0, 5, 9, 14]]]))


def every_16_bit_value(dtype: torch.dtype) -> Iterator[Tensor]:
    """Every value of the type, NaN and infinity among them, beside scales of several magnitudes, in pairs."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (1.0, 1.5, 1.9921875, 3.0e-5, 6.1e-5, 60000.0, 1e-40 if dtype == torch.bfloat16 else 6e-8):
        yield torch.stack([every, torch.full_like(every, scale)], dim=1).view(64, -1)


def scales_of_every_kind(count: int) -> Tensor:
    """Ordinary, huge, subnormal, negative and special ones; and such that products are ties of the 16-bit types."""
    rng = np.random.default_rng(6)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, TINY, -TINY, 1.1754942e-38, FLT_MAX, -FLT_MAX, 1.0, -1.0]
    special += [65504, 65519.996, 65520, 65536, 2**-24, 2**-25, 2**-14, 2.98e-8, 3.3895314e38, 3.3961775e38]
    scales = (rng.standard_normal(count) * np.exp2(rng.integers(-149, 127, count))).astype(np.float32)
    scales[::3] = rng.standard_normal(scales[::3].size)
    scales[1::6] = rng.standard_normal(scales[1::6].size) * np.exp2(rng.integers(-26, 17, scales[1::6].size))
    scales[2::6] = (scales[2::6].view(np.uint32) & np.uint32(0xFFFF8000)).view(np.float32)
    scales[5::6] = (scales[5::6].view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    scales[: min(len(special), count)] = np.array(special, dtype=np.float32)[:count]
    return torch.from_numpy(scales)


def packed_weight(n: int, d: int, group_size: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Every byte, and ordinary scales of both signs."""
    rng = np.random.default_rng(seed)
    packed = torch.from_numpy(rng.integers(0, 256, (n, d // 2), dtype=np.uint8))
    return packed, torch.from_numpy(rng.standard_normal((n, d // group_size), dtype=np.float32))


def bits(tensor: Tensor) -> Tensor:
    """The bits of the values, on the CPU: NaN too can be compared."""
    return tensor.cpu().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_bits(found: Tensor, expected: Tensor, what: object) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    different = bits(found) != bits(expected)
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        count, first = int(different.sum()), f"{found[at].item()!r}, not {expected[at].item()!r}"
        raise AssertionError(f"{what}: {count} of {different.numel()} differ, the first at {at}: {first}")
