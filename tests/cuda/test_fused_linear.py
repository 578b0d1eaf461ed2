"""The product of few activations with the packed weight itself, on a GPU and executed on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.gpus import ExecutedGpu, Gpu
from tests.support.helpers import relative
from tests.support.products import assert_product

OPS = torch.ops.squish
DTYPES = (torch.bfloat16, torch.float16)


def check(
    gpu: Gpu, x: Tensor, n: int, group_size: int, bias_dtype: torch.dtype | None = None, *, plainly: bool = False
) -> None:
    """plainly: without tensor cores, because type or shape do not allow them."""
    d, block = x.shape[1], math.lcm(2, group_size)
    columns = -(-d // block) * block
    packed, scales = inputs.packed_weight(n, columns, group_size)
    bias = None if bias_dtype is None else inputs.normal(n, seed=10).to(bias_dtype)
    y = gpu.linear_nf4(
        gpu.put(x), gpu.put(packed), gpu.put(scales), None if bias is None else gpu.put(bias), group_size
    )
    weight = OPS.dequantize_nf4(packed, scales, group_size)[:, :d]
    what = f"x {tuple(x.shape)}, strides {x.stride()}, {n} rows, group_size {group_size}, bias {bias_dtype}"
    assert_product(y.cpu(), x, weight.t(), bias, what)
    if isinstance(gpu, ExecutedGpu):
        assert ("multiply_plain" in gpu.gpu.launched[-1]) == plainly, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_every_number_of_activations(gpu: Gpu, group_size: int, dtype: torch.dtype) -> None:
    most = {32: 16, 64: 32}.get(group_size, 64)
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 63, 64):
        if m <= most:
            check(gpu, inputs.normal(m, 512, seed=9).to(dtype), 40, group_size, dtype if m % 2 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns(gpu: Gpu, dtype: torch.dtype) -> None:
    """Fewer columns than a block has warps, numbers of rows that fill no tile, groups as long as a row."""
    for d, group_size in (
        (128, 32),
        (128, 64),
        (128, 128),
        (384, 64),
        (640, 32),
        (2176, 128),
        (4096, 64),
        (4096, 4096),
    ):
        for n in (32, 33, 47, 64, 65):
            check(gpu, inputs.normal(3, d, seed=9).to(dtype), n, group_size, torch.float32)


def test_more_blocks_than_multiprocessors(gpu: Gpu) -> None:
    check(gpu, inputs.normal(2, 256).bfloat16(), 32 * 133 + 5, 64)


@pytest.mark.parametrize("group_size", [64, 8, 3])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_bias_is_added_once(gpu: Gpu, bias_dtype: torch.dtype | None, group_size: int) -> None:
    packed, scales = inputs.packed_weight(50, 384, group_size)
    bias = torch.zeros(50) if bias_dtype is None else inputs.normal(50, seed=10).to(bias_dtype)
    given = None if bias_dtype is None else gpu.put(bias)
    x = gpu.put(torch.zeros(3, 384, dtype=torch.bfloat16))
    y = gpu.linear_nf4(x, gpu.put(packed), gpu.put(scales), given, group_size)
    assert_same_bits(y, bias.to(torch.bfloat16).expand(3, -1), bias_dtype)


@pytest.mark.parametrize("group_size", [4, 32, 64, 128])
def test_one_weight_at_a_time(gpu: Gpu, group_size: int) -> None:
    """With x a column of the identity, y is a column of the weight: each comes from its byte and its scale."""
    n, d = 32, 256
    packed, scales = inputs.packed_weight(n, d, group_size)
    levels = OPS.dequantize_nf4(packed, torch.ones_like(scales), group_size)
    many = 16 if group_size >= 32 else 8  # with tensor cores, where the levels are rounded, and without
    levels = levels.bfloat16().float() if group_size >= 32 else levels
    expected = (levels * scales.repeat_interleave(group_size, dim=1)).bfloat16()
    for first in range(0, d, many):
        x = torch.eye(d, dtype=torch.bfloat16)[first : first + many]
        y = gpu.linear_nf4(gpu.put(x.clone()), gpu.put(packed), gpu.put(scales), None, group_size)
        assert bool((y.cpu() == expected[:, first : first + many].t()).all()), first


def test_x_of_any_strides_width_and_alignment(gpu: Gpu) -> None:
    wide = inputs.normal(12, 600, seed=11).bfloat16()
    for x in (wide[::2, :256], wide[:, 1:257], wide[:, ::2][:, :256], wide[:1, :256].expand(5, 256)):
        check(gpu, x, 64, 64)
    for d in (97, 127, 225, 255):
        check(gpu, wide[:5, :d], 33, 32)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_without_tensor_cores(gpu: Gpu, dtype: torch.dtype) -> None:
    """Group sizes of all kinds, numbers of rows that fill no warp, columns that fill no stretch, all activations."""
    sizes = [(1, 2), (2, 2), (3, 6), (5, 40), (8, 8), (8, 520), (16, 1040), (24, 1200), (100, 600), (1000, 2000)]
    sizes += [(64, 64), (64, 2112), (96, 96), (4096, 4096)] if dtype == torch.float32 else []
    for group_size, d in sizes:
        for n, m in ((1, 1), (2, 3), (31, 2), (33, 8), (40, 5), (34, 16 if dtype != torch.float32 else 29)):
            check(gpu, inputs.normal(m, d, seed=9).to(dtype), n, group_size, dtype if m % 2 else None, plainly=True)


def test_without_tensor_cores_x_may_have_any_strides_and_packed_any_alignment(gpu: Gpu) -> None:
    wide = inputs.normal(12, 600, seed=11).float()
    for x in (wide[::2, :256], wide[:8, 1:258], wide[:8, ::2][:, :255], wide[:1, :256].expand(5, 256)):
        check(gpu, x, 20, 32, plainly=True)
    packed, scales = inputs.packed_weight(40, 256, 64)
    weight = OPS.dequantize_nf4(packed, scales, 64)
    for dtype in inputs.DENSE_DTYPES:
        x = wide[:3, :256].to(dtype)
        for start in (1, 2, 4, 8):  # tensor cores ask for sixteen
            larger = torch.zeros(packed.numel() + 8, dtype=torch.uint8)
            moved = larger[start : start + packed.numel()].view_as(packed).copy_(packed)
            y = gpu.linear_nf4(gpu.put(x), gpu.put(moved), gpu.put(scales), None, 64)
            assert_product(y.cpu(), x, weight.t(), None, (dtype, start))


def test_without_tensor_cores_large_and_small_x_are_those_of_a_dense_layer(gpu: Gpu) -> None:
    """The levels are scaled before they are summed: nothing overflows that need not."""
    for scale, size in ((1e-3, 1e38), (2.0**30, 2.0**-140)):
        packed, scales = torch.full((4, 128), 0xFF, dtype=torch.uint8), torch.full((4, 4), scale)
        x = torch.full((2, 256), size) * torch.tensor([1.0, -1.0])[:, None]
        y = gpu.linear_nf4(gpu.put(x), gpu.put(packed), gpu.put(scales), None, 64).cpu()
        assert relative(y, x.double() @ OPS.dequantize_nf4(packed, scales, 64).double().t()) <= 1e-6


def test_a_weight_without_columns_gives_the_bias(gpu: Gpu) -> None:
    packed, scales = torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3, 0)
    for group_size in (64, 2**32):
        y = gpu.linear_nf4(
            gpu.put(torch.zeros(2, 0)), gpu.put(packed), gpu.put(scales), gpu.put(torch.arange(3.0)), group_size
        )
        assert y.cpu().tolist() == [[0.0, 1.0, 2.0]] * 2


def test_float32_is_as_exact_as_on_the_cpu(gpu: Gpu) -> None:
    packed, scales = inputs.packed_weight(64, 14336, 64)
    weight = OPS.dequantize_nf4(packed, scales, 64).double()
    x = inputs.normal(4, 14336).float()
    y = gpu.linear_nf4(gpu.put(x), gpu.put(packed), gpu.put(scales), None, 64).cpu()
    assert relative(y, x.double() @ weight.t()) <= 1e-6


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_nan_and_infinity_come_through(gpu: Gpu, dtype: torch.dtype) -> None:
    packed, scales = inputs.packed_weight(32, 256, 64)
    scales[3, 1], scales[5, 2] = math.nan, math.inf
    for m in (1, 8) if isinstance(gpu, ExecutedGpu) else (1, 8, 40, 200):  # the last two on a decoded weight
        x = inputs.normal(m, 256).to(dtype)
        y = gpu.linear_nf4(gpu.put(x), gpu.put(packed), gpu.put(scales), None, 64).cpu()
        assert bool(y[:, 3].isnan().all())
        assert not bool(y[:, 5].isfinite().any())
        rest = [row for row in range(32) if row not in (3, 5)]
        assert bool(y[:, rest].isfinite().all())
