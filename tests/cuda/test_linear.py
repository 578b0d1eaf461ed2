"""linear_nf4 and its gradient on a GPU, against float64; the layer and the model pass."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.helpers import relative
from tests.support.products import assert_product

OPS = torch.ops.squish
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 65, 130)


def check_linear(n: int, d: int, group_size: int, m: int, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    """d: columns of x; the packed weight has as many as fill its last block, with the level 0."""
    block = math.lcm(2, group_size)
    columns = -(-d // block) * block
    packed, scales = (t.cuda() for t in inputs.packed_weight(n, columns, group_size))
    weight = OPS.dequantize_nf4(packed, scales, group_size)[:, :d]
    x = inputs.normal(m, d, seed=9).to(dtype).cuda()
    bias = None if bias_dtype is None else inputs.normal(n, seed=10).to(bias_dtype).cuda()
    y = OPS.linear_nf4(x, packed, scales, bias, group_size)
    assert y.shape == (m, n)
    assert_product(y, x, weight.t(), bias, f"n {n}, d {d}, group_size {group_size}, m {m}, {dtype}, bias {bias_dtype}")


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_every_batch(dtype: torch.dtype) -> None:
    for m in BATCHES:
        for n, d, group_size in ((96, 512, 64), (70, 256, 32), (33, 1152, 128), (130, 96, 16), (70, 200, 100)):
            check_linear(n, d, group_size, m, dtype, None if m % 2 else dtype)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 40])
def test_every_size_of_weight(dtype: torch.dtype, m: int) -> None:
    sizes = [
        (1, 2),
        (2, 2),
        (3, 3),
        (15, 16),
        (63, 64),
        (64, 64),
        (128, 64),
        (192, 64),
        (250, 64),
        (120, 128),
        (2047, 32),
        (1000, 40),
        (4099, 64),
        (4096, 4096),
    ]
    for d, group_size in sizes:
        for n in (1, 2, 31, 32, 33, 100):
            check_linear(n, d, group_size, m, dtype, torch.float32 if n % 2 else None)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_a_layer_as_large_as_those_of_models(dtype: torch.dtype) -> None:
    for m in (1, 5, 16, 32, 64, 300):
        check_linear(4096, 4096, 64, m, dtype, dtype)
    check_linear(4096, 4096, 64, 700, dtype, dtype)  # cuBLAS has enough to do, and writes the result itself
    check_linear(4096, 4096, 64, 700, dtype, torch.float16)
    check_linear(4096, 4096, 64, 700, dtype, None)
    check_linear(11008, 4096, 64, 3, dtype, None)
    check_linear(4096, 14336, 128, 3, dtype, None)


def test_x_of_any_strides() -> None:
    packed, scales = (t.cuda() for t in inputs.packed_weight(64, 256, 64))
    weight = OPS.dequantize_nf4(packed, scales, 64)
    wide = inputs.normal(12, 600, seed=11).to(torch.bfloat16).cuda()
    for x in (wide[::2, :256], wide[:, 1:257], wide[:, ::2][:, :256], wide[:1, :256].expand(5, 256), wide[:0, :256]):
        y = OPS.linear_nf4(x, packed, scales, None, 64)
        if x.numel():
            assert_product(y, x, weight.t(), None, x.stride())
    y = OPS.linear_nf4(wide[:, :256].view(2, 6, 256), packed, scales, None, 64)
    assert y.shape == (2, 6, 64)


def test_twice_the_same_call_gives_the_same_bits() -> None:
    packed, scales = (t.cuda() for t in inputs.packed_weight(4096, 4096, 64))
    for m in (1, 4, 16, 32, 64):
        x = inputs.normal(m, 4096).to(torch.bfloat16).cuda()
        first = OPS.linear_nf4(x, packed, scales, None, 64)
        for _ in range(5):
            assert_same_bits(OPS.linear_nf4(x, packed, scales, None, 64), first, m)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    for n, d, group_size in ((96, 512, 64), (70, 255, 32), (33, 100, 3)):
        block = math.lcm(2, group_size)
        packed, scales = (t.cuda() for t in inputs.packed_weight(n, -(-d // block) * block, group_size))
        weight = OPS.dequantize_nf4(packed, scales, group_size)[:, :d]
        for m in (1, 8, 200):
            x = inputs.normal(m, d).to(dtype).cuda().requires_grad_()
            bias = inputs.normal(n).to(dtype).cuda().requires_grad_()
            dy = inputs.normal(m, n, seed=12).to(dtype).cuda()
            OPS.linear_nf4(x, packed, scales, bias, group_size).backward(dy)
            assert x.grad is not None
            assert bias.grad is not None
            assert_product(x.grad, dy, weight, None, f"n {n}, d {d}, m {m}")
            assert relative(bias.grad, dy.double().sum(0)) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
def test_the_gradient_of_a_layer_as_large_as_those_of_models(dtype: torch.dtype) -> None:
    packed, scales = (t.cuda() for t in inputs.packed_weight(4096, 4096, 64))
    weight = OPS.dequantize_nf4(packed, scales, 64)
    for m in (3, 700):
        dy = inputs.normal(m, 4096, seed=12).to(dtype).cuda()
        assert_product(OPS._linear_nf4_grad_x(dy, packed, scales, 64, 4096), dy, weight, None, m)


def test_a_layer_that_was_quantized_on_the_gpu_is_the_one_quantized_on_the_cpu() -> None:
    linear = nn.Linear(500, 300)
    on_cpu = NF4Linear.from_linear(linear, group_size=64)
    on_gpu = NF4Linear.from_linear(linear.cuda(), group_size=64)
    for (name, found), expected in zip(on_gpu.state_dict().items(), on_cpu.state_dict().values(), strict=True):
        assert found.is_cuda
        assert_same_bits(found, expected, name)
    x = inputs.normal(7, 500).float()
    expected = on_cpu(x)
    assert relative(on_gpu(x.cuda()).cpu(), expected.double()) <= 1e-5
    assert relative(on_cpu.cuda()(x.cuda()).cpu(), expected.double()) <= 1e-5


def test_a_model_is_quantized_and_restored() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().to(torch.bfloat16)
    x = inputs.normal(5, 256).to(torch.bfloat16).cuda()
    before = model(x)
    report = quantize_model(model, group_size=64)
    assert len(report.layers) == 2
    assert all(0.05 < layer.relative_rms_error < 0.15 for layer in report.layers)
    quantized = model(x)
    assert relative(quantized, before.double()) < 0.3
    dequantize_model(model)
    dense = model(x)
    assert relative(dense, quantized.double()) < 0.02
    assert F.linear(x, model[0].weight).is_cuda
