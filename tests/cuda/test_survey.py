"""_survey_nf4 on a GPU, and executed on the CPU, finds to the bit what the CPU finds."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.gpus import Gpu

OPS = torch.ops.squish
SIZES = ((5, 64, 32), (3, 100, 50), (7, 1030, 5), (4, 2, 1), (2, 4096, 64), (3, 0, 4), (0, 64, 16), (70, 600, 600))
PADDED = ((5, 61, 32), (3, 99, 50), (4, 1028, 5), (2, 3, 3), (3, 1, 64), (6, 700, 512), (2, 1030, 1024))


def check(gpu: Gpu, w: torch.Tensor, group_size: int) -> None:
    wide = torch.nn.functional.pad(w, (0, -w.shape[1] % math.lcm(2, group_size)))
    packed, scales = OPS.quantize_nf4(wide, group_size)
    found = gpu.survey_nf4(gpu.put(w), gpu.put(packed), gpu.put(scales), group_size)
    assert_same_bits(found, OPS._survey_nf4(w, packed, scales, group_size), (w.dtype, w.shape, w.stride(), group_size))


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES, ids=str)
def test_shapes_and_padding(gpu: Gpu, dtype: torch.dtype) -> None:
    for n, d, group_size in (*SIZES, *PADDED):
        scale = torch.exp2(torch.arange(n, dtype=torch.float64)[:, None] % 20 - 10)
        check(gpu, (inputs.normal(n, d) * scale).to(dtype), group_size)


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES, ids=str)
def test_layouts(gpu: Gpu, dtype: torch.dtype) -> None:
    for w in inputs.layouts(dtype).values():
        check(gpu, w, 64)


def test_zeros_subnormals_and_the_largest_floats(gpu: Gpu) -> None:
    w = inputs.awkward_groups(64)
    check(gpu, w[w.isfinite().all(dim=1)], 64)


def test_the_largest_magnitude_says_what_is_not_finite(gpu: Gpu) -> None:
    w = inputs.awkward_groups(64)
    packed, scales = OPS.quantize_nf4(w, 64)
    found = gpu.survey_nf4(gpu.put(w), gpu.put(packed), gpu.put(scales), 64).cpu()
    assert bool((found[:, 0].isfinite() == w.isfinite().all(dim=1)).all())
