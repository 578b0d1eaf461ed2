"""Tensors at an address that does not fit their type, as torch.frombuffer makes of an odd place in a file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squish_nf4 import NF4Linear

ops = torch.ops.squish


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that begins one byte after a multiple of its element size."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.empty(size + 2 * tensor.element_size(), dtype=torch.uint8).numpy()
    start = -memory.ctypes.data % tensor.element_size() + 1
    memory[start : start + size] = tensor.contiguous().view(torch.uint8).flatten().numpy()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    assert copy.data_ptr() % 2 == 1
    return copy


@pytest.mark.parametrize("columns", [slice(None), slice(0, 64)], ids=["whole", "rows apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_weight_gives_the_same_bytes_and_the_same_survey(dtype: torch.dtype, columns: slice) -> None:
    w = torch.randn(9, 96).to(dtype)
    wanted = ops.quantize_nf4(w[:, columns], 32)
    assert all(map(torch.equal, ops.quantize_nf4(misaligned(w)[:, columns], 32), wanted))
    survey = ops._survey_nf4(misaligned(w)[:, columns], wanted[0], misaligned(wanted[1]), 32)
    assert torch.equal(survey, ops._survey_nf4(w[:, columns], *wanted, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_decode_to_the_same_weights_and_an_out_is_refused(dtype: torch.dtype) -> None:
    packed, scales = ops.quantize_nf4(torch.randn(9, 96), 32)
    dense = ops.dequantize_nf4(packed, scales, 32, dtype=dtype)
    assert torch.equal(ops.dequantize_nf4(packed, misaligned(scales), 32, dtype=dtype), dense)
    out = torch.zeros_like(dense)
    ops.dequantize_nf4.out(packed, misaligned(scales), 32, out=out)
    assert torch.equal(out, dense)
    size = out.element_size()
    message = f"dequantize_nf4: out must lie at a multiple of its {size} bytes an element, and its address is none"
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.dequantize_nf4.out(packed, scales, 32, out=misaligned(out))


@pytest.mark.parametrize("m", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_and_its_gradient_are_the_same(dtype: torch.dtype, m: int) -> None:
    packed, scales = ops.quantize_nf4(torch.randn(9, 96), 32)
    x, bias = torch.randn(m, 96).to(dtype), torch.randn(9).to(dtype)
    y = ops.linear_nf4(x, packed, scales, bias, 32)
    assert torch.equal(ops.linear_nf4(misaligned(x), packed, misaligned(scales), misaligned(bias), 32), y)
    dx = ops._linear_nf4_grad_x(y, packed, scales, 32, 96)
    assert torch.equal(ops._linear_nf4_grad_x(misaligned(y), packed, misaligned(scales), 32, 96), dx)


def test_a_layer_takes_a_state_of_them() -> None:
    layer, other = NF4Linear(96, 9), NF4Linear(96, 9)
    other.load_state_dict({name: misaligned(tensor) for name, tensor in layer.state_dict().items()}, assign=True)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))
