"""quantize_nf4 on a GPU, and executed on the CPU, gives the bytes that the CPU gives: any shape, layout and value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.gpus import Gpu

OPS = torch.ops.squish


def assert_as_on_the_cpu(gpu: Gpu, w: Tensor, group_size: int, what: str = "") -> None:
    """w: on the CPU, and on the GPU with the same strides."""
    packed, scales = gpu.quantize_nf4(gpu.put(w), group_size)
    expected_packed, expected_scales = OPS.quantize_nf4(w, group_size)
    what = f"{what} {w.dtype}, shape {tuple(w.shape)}, strides {w.stride()}, group_size {group_size}"
    assert_same_bits(scales, expected_scales, f"scales: {what}")
    assert_same_bits(packed, expected_packed, f"packed: {what}")


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES, ids=str)
def test_shapes_and_group_sizes(dtype: torch.dtype, gpu: Gpu) -> None:
    for n, d, group_size in inputs.shapes():
        assert_as_on_the_cpu(gpu, inputs.normal(n, d).to(dtype), group_size)


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, gpu: Gpu) -> None:
    for name, w in inputs.layouts(dtype).items():
        for group_size in (1, 3, 8, 16, 32, 64, 96, 192):
            assert_as_on_the_cpu(gpu, w, group_size, name)


def test_ties_and_their_neighbours_at_every_scale(gpu: Gpu) -> None:
    for w, group_size in inputs.around_the_boundaries(range(-126, 127)):
        assert_as_on_the_cpu(gpu, w, group_size)


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES, ids=str)
def test_zeros_subnormals_the_largest_floats_infinity_and_nan(dtype: torch.dtype, gpu: Gpu) -> None:
    for group_size in inputs.GROUP_SIZES:
        w = inputs.awkward_groups(group_size).to(dtype)
        assert_as_on_the_cpu(gpu, w, group_size)
        assert_as_on_the_cpu(gpu, w.view(1, -1), group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype: torch.dtype, gpu: Gpu) -> None:
    for w in inputs.every_16_bit_value(dtype):
        for group_size in (2, 16, 32, 64, 128):
            assert_as_on_the_cpu(gpu, w, group_size)


def test_float64_is_rounded_to_float32_first(gpu: Gpu) -> None:
    below = inputs.normal(20, 192).float()
    above = torch.nextafter(below, torch.tensor(math.inf))
    halfway = (below.double() + above.double()) / 2
    for w in (halfway, halfway * (1 - 2.0**-53), halfway * (1 + 2.0**-52), halfway * 2.0**-140, halfway * 1e38):
        for group_size in (3, 32, 64):
            assert_as_on_the_cpu(gpu, w, group_size)


def test_random_bits(gpu: Gpu) -> None:
    """Any float at all, and then groups whose floats are near each other's magnitude."""
    generator = torch.Generator().manual_seed(8)
    for spread in (32, 4, 1):
        exponents = torch.randint(0, 256 - spread, (512, 32, 1), generator=generator)
        exponents = (exponents + torch.randint(0, spread, (512, 32, 64), generator=generator)).clamp(max=254)
        fraction = torch.randint(0, 2**23, exponents.shape, generator=generator)
        sign = torch.randint(0, 2, exponents.shape, generator=generator)
        w = (exponents << 23 | fraction | sign << 31).to(torch.int32).view(torch.float32).view(512, -1)
        for dtype in (torch.float32, torch.bfloat16):
            for group_size in (16, 64, 128):
                assert_as_on_the_cpu(gpu, w.to(dtype), group_size)
