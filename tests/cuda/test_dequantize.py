"""dequantize_nf4 on a GPU, and executed on the CPU, gives the bits that the CPU gives: any shape, scale, alignment."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.gpus import Gpu

OPS = torch.ops.squish


def assert_as_on_the_cpu(gpu: Gpu, packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> None:
    """packed, scales: on the CPU, and on the GPU with the same strides."""
    expected = OPS.dequantize_nf4(packed, scales, group_size, dtype=dtype)
    found = gpu.dequantize_nf4(gpu.put(packed), gpu.put(scales), group_size, dtype=dtype)
    assert_same_bits(found, expected, f"{dtype}, packed {tuple(packed.shape)}, group_size {group_size}")


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_shapes_and_group_sizes(dtype: torch.dtype, gpu: Gpu) -> None:
    for n, d, group_size in inputs.shapes():
        assert_as_on_the_cpu(gpu, *inputs.packed_weight(n, d, group_size), group_size, dtype)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_every_byte_under_scales_of_every_kind(dtype: torch.dtype, gpu: Gpu) -> None:
    for group_size in (1, 2, 3, 8, 16, 32, 64, 100, 512):
        d = math.lcm(512, group_size)
        packed = torch.arange(256, dtype=torch.uint8).repeat(60 * d // 512).view(60, -1)
        scales = inputs.scales_of_every_kind(60 * d // group_size).view(60, -1)
        assert_as_on_the_cpu(gpu, packed, scales, group_size, dtype)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_arguments_that_start_anywhere(dtype: torch.dtype, gpu: Gpu) -> None:
    """packed, scales and out as views into larger tensors; what lies beside out is not touched."""
    n, d = 5, 1024
    for group_size in (2, 8, 16, 32, 64, 128):
        packed, scales = inputs.packed_weight(n, d, group_size)
        expected = OPS.dequantize_nf4(packed, scales, group_size, dtype=dtype)
        for start in (0, 1, 2, 3, 4, 8):
            wide_packed = torch.zeros(packed.numel() + 16, dtype=torch.uint8)
            wide_scales = torch.zeros(scales.numel() + 16)
            p = gpu.put(wide_packed[start : start + packed.numel()].view_as(packed).copy_(packed))
            s = gpu.put(wide_scales[start : start + scales.numel()].view_as(scales).copy_(scales))
            for at in (0, 1, 2, 4, start):
                wide_out = gpu.put(torch.full((expected.numel() + 32,), 7.0, dtype=dtype))
                out = wide_out[at : at + expected.numel()].view_as(expected)
                gpu.dequantize_nf4_out(p, s, group_size, out)
                what = f"{dtype}, group_size {group_size}, packed and scales from {start}, out from {at}"
                assert_same_bits(out, expected, what)
                beside = torch.cat([wide_out[:at], wide_out[at + expected.numel() :]])
                assert bool((beside == 7).all()), what


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_strided_arguments(dtype: torch.dtype, gpu: Gpu) -> None:
    packed, scales = inputs.packed_weight(12, 512, 64)
    for p, s in (
        (packed[::2], scales[::2]),
        (packed[:, 32:96], scales[:, 1:3]),
        (packed[:1].expand(9, -1), scales[:9]),
    ):
        assert_as_on_the_cpu(gpu, p, s, 64, dtype)
