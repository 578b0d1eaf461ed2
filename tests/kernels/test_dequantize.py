"""dequantize_nf4 gives level times scale in float32, rounded once for a 16-bit dtype: bit for bit, on every CPU path.

Functions named ``check_...`` run in a child process in which one CPU path is forced.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from squish_nf4 import _C
from tests.support import reference
from tests.support.cases import GROUP_SIZES, shapes
from tests.support.helpers import ForcedIsa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THE_NAN = {"float32": 0x7FC00000, "bfloat16": 0x7FC0, "float16": 0x7E00}


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearer of the two neighbouring bfloat16 numbers, the even one on a tie, by measuring."""
    low = x.view(np.uint32) & np.uint32(0xFFFF0000)  # towards zero
    high = low + np.uint32(0x10000)  # away from zero; past the largest it is infinity, which stands for 2^128
    past_largest = np.float64(2.0**128) * np.sign(x)
    away = np.where(np.isinf(high.view(np.float32)), past_largest, high.view(np.float32).astype(np.float64))
    with np.errstate(invalid="ignore"):
        to_low = np.abs(x - low.view(np.float32).astype(np.float64))
        to_high = np.abs(away - x)
    even = (high >> 16) % 2 == 0
    up = np.isfinite(x) & ((to_high < to_low) | ((to_high == to_low) & even))
    return (np.where(up, high, low) >> 16).astype(np.uint16)


def expected_bits(packed: np.ndarray, scales: np.ndarray, group_size: int, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        product = reference.dequantize(packed, scales, group_size)
        bits = {
            "float32": lambda: product.view(np.uint32).copy(),
            "float16": lambda: product.astype(np.float16).view(np.uint16),
            "bfloat16": lambda: rounded_to_bfloat16(product),
        }[dtype]()
    bits[np.isnan(product)] = THE_NAN[dtype]  # whatever bits the processor gives a NaN, there is one
    return bits


def bits_of(x: Tensor) -> np.ndarray:
    integer, unsigned = (torch.int32, np.uint32) if x.dtype == torch.float32 else (torch.int16, np.uint16)
    return x.view(integer).numpy().view(unsigned)


def assert_decodes_to_the_definition(packed: Tensor, scales: Tensor, group_size: int, dtype: str, isa: str) -> None:
    assert _C.cpu_isa() == isa, f"{_C.cpu_isa()} runs, not {isa}"
    packed_before, scales_before = packed.clone(), scales.view(torch.int32).clone()
    expected = expected_bits(packed.contiguous().numpy(), scales.contiguous().numpy(), group_size, dtype)
    what = f"{dtype}, packed {tuple(packed.shape)}, strides {packed.stride()}, group_size {group_size}"
    decoded = torch.ops.squish.dequantize_nf4(packed, scales, group_size, dtype=DTYPES[dtype])
    assert decoded.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(bits_of(decoded), expected, err_msg=what, strict=True)

    around = torch.full((decoded.numel() + 2,), 7.0, dtype=DTYPES[dtype])
    out = around[1:-1].view(decoded.shape)
    assert torch.ops.squish.dequantize_nf4.out(packed, scales, group_size, out=out) is out
    np.testing.assert_array_equal(bits_of(out), expected, err_msg=f"out, {what}", strict=True)
    assert around[0] == around[-1] == 7.0, f"written beyond out: {what}"

    assert torch.equal(packed, packed_before), f"packed was written to: {what}"
    assert torch.equal(scales.view(torch.int32), scales_before), f"scales was written to: {what}"


def any_bytes(rng: np.random.Generator, n: int, d: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, (n, d // 2), dtype=np.uint8))


def check_shapes(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for n, d, group_size in shapes():
        scales = torch.from_numpy(rng.standard_normal((n, d // group_size)).astype(np.float32))
        assert_decodes_to_the_definition(any_bytes(rng, n, d), scales, group_size, dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_equal_the_definition(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_shapes, forced_isa.isa, dtype)


def awkward_scales() -> np.ndarray:
    """Every exponent with both signs and several fractions, subnormals, zeros, infinities, NaN of every kind."""
    rng = np.random.default_rng(2)
    exponents = np.arange(256, dtype=np.uint32) << 23
    fractions = [rng.integers(0, 2**23, 256).astype(np.uint32) for _ in range(6)]
    fractions += [np.full(256, bits, dtype=np.uint32) for bits in (0, 1, 2**22, 2**23 - 1)]
    positive = np.concatenate([exponents | fraction for fraction in fractions])
    return np.concatenate([positive, positive | np.uint32(2**31)]).view(np.float32)


def check_awkward_scales(isa: str, dtype: str) -> None:
    scales = torch.from_numpy(awkward_scales())
    assert scales.isnan().any()
    assert scales.isinf().any()
    assert (scales < 0).any()
    every_byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for group_size in (1, 2, 3, 32):
        groups = 16 // math.gcd(16, group_size) * 2  # whole bytes, at least 16 of them in a row
        some = scales[:: 3 if group_size < 32 else 1]
        rows = some[: len(some) // groups * groups].view(-1, groups)
        packed = every_byte.repeat(rows.shape[0] * group_size * groups // 512 + 1)
        packed = packed[: rows.shape[0] * group_size * groups // 2].view(rows.shape[0], -1)
        assert_decodes_to_the_definition(packed, rows, group_size, dtype, isa)
    all_levels = every_byte.expand(len(scales), 256)
    assert_decodes_to_the_definition(all_levels, scales[:, None], 512, dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_scales_of_every_exponent_and_sign(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_awkward_scales, forced_isa.isa, dtype)


def check_ties(isa: str, dtype: str) -> None:
    """Scales halfway between two 16-bit numbers and beside that: level 1.0 decodes to them, so the rounding decides."""
    bits = {"bfloat16": np.uint32(0x8000), "float16": np.uint32(0x1000)}[dtype]
    rng = np.random.default_rng(3)
    halfway = (rng.integers(0, 2**31 - 2**24, 6000).astype(np.uint32) & ~(2 * bits - np.uint32(1))) | bits
    for scales in (halfway - np.uint32(1), halfway, halfway + np.uint32(1)):
        column = torch.from_numpy(scales.view(np.float32))[:, None]
        levels = torch.tensor([0xFF, 0x0F, 0xF0, 0x7F, 0x3C, 0xE1], dtype=torch.uint8).repeat(6)
        assert_decodes_to_the_definition(levels.expand(6000, 36), column, 72, dtype, isa)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_results_are_rounded_once_to_nearest_even(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_ties, forced_isa.isa, dtype)


def check_layouts(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    bytes_ = any_bytes(rng, 80, 400)
    floats = torch.from_numpy(rng.standard_normal((80, 40)).astype(np.float32))
    for packed, scales in (
        (bytes_[::2, :96], floats[::2, :6]),
        (bytes_[:40, :192:2], floats[:40, :12:2]),
        (bytes_[:, 3:99].t()[:, :48].t(), floats[:48, 1:7].t().contiguous().t()),
        (bytes_.flatten()[1 : 1 + 20 * 96].view(20, 96), floats.flatten()[1:121].view(20, 6)),
        (bytes_[:1, :96].expand(9, 96), floats[:9, :1].expand(9, 6)),
    ):
        assert_decodes_to_the_definition(packed, scales, 32, dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_in_memory_changes_nothing(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_layouts, forced_isa.isa, dtype)


def check_far_larger_than_the_caches(isa: str, dtype: str) -> None:
    """Such results are stored past the caches if out and the groups allow it: its bits are those of its parts."""
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(6)
    columns = 4096
    packed = any_bytes(rng, last_cache_bytes() * 2 // columns // DTYPES[dtype].itemsize, columns)
    for group_size in (32, 2048):
        scales = torch.from_numpy(rng.standard_normal((len(packed), columns // group_size)).astype(np.float32))
        whole = torch.empty(len(packed) + 1, columns, dtype=DTYPES[dtype])
        whole[-1] = 7.0
        torch.ops.squish.dequantize_nf4.out(packed, scales, group_size, out=whole[:-1])
        for first in range(0, len(packed), 97):
            rows = slice(first, min(first + 97, len(packed)))
            part = torch.ops.squish.dequantize_nf4(packed[rows], scales[rows], group_size, dtype=DTYPES[dtype])
            assert torch.equal(whole[rows], part)
        assert bool((whole[-1] == 7.0).all()), "written beyond out"
        assert_decodes_to_the_definition(packed[-9:], scales[-9:], group_size, dtype, isa)


def last_cache_bytes() -> int:
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_far_larger_than_the_caches(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_far_larger_than_the_caches, forced_isa.isa, dtype)


def check_modes(isa: str) -> None:
    """Flush-denormal asked for by the process, and 1, 2 or 5 threads."""
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(5)
    for group_size in (48, 63):
        packed = any_bytes(rng, 45, 8064)
        scales = torch.from_numpy(rng.integers(0, 2**24, (45, 8064 // group_size)).astype(np.uint32).view(np.float32))
        for dtype, kind in DTYPES.items():
            expected = expected_bits(packed.numpy(), scales.numpy(), group_size, dtype)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.set_flush_denormal(threads != 2)
                decoded = torch.ops.squish.dequantize_nf4(packed, scales, group_size, dtype=kind)
                torch.set_flush_denormal(False)
                torch.set_num_threads(2)
                np.testing.assert_array_equal(bits_of(decoded), expected, err_msg=f"{dtype}, {threads} threads")


def test_threads_and_flush_denormal_change_no_bit(forced_isa: ForcedIsa) -> None:
    forced_isa(check_modes, forced_isa.isa)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_levels_times_a_scale_come_back_exactly(rng: np.random.Generator, group_size: int) -> None:
    d = 4 * math.lcm(2, group_size)
    index = rng.integers(0, 16, (127, d))
    index[:, ::group_size] = 15  # the level 1.0, which makes the scale the largest magnitude
    scale = np.ldexp(np.float32(1), np.arange(-100, 27)).astype(np.float32)[:, None]
    w = torch.from_numpy(reference.LEVELS[index] * scale)
    packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
    assert torch.equal(scales, torch.from_numpy(scale).expand_as(scales))
    assert torch.equal(torch.ops.squish.dequantize_nf4(packed, scales, group_size), w)


def test_default_dtype_is_float32(rng: np.random.Generator) -> None:
    packed, scales = any_bytes(rng, 3, 64), torch.ones(3, 2)
    decoded = torch.ops.squish.dequantize_nf4(packed, scales)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.ops.squish.dequantize_nf4(packed, scales, 32, dtype=torch.float32))


def test_rounding_oracle_agrees_with_torch(rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(rounded_to_bfloat16(x), bits_of(torch.from_numpy(x).to(torch.bfloat16)))
