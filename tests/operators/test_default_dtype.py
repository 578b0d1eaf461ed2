"""Another default dtype (torch.set_default_dtype) changes nothing but the dtype of a new layer's bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import vmap

import squish_nf4
from squish_nf4 import NF4Linear, NF4Packer

OPS = torch.ops.squish


@pytest.fixture
def set_default() -> Iterator[Callable[[torch.dtype], None]]:
    """torch.set_default_dtype until the test ends; it begins with float32."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(1))


def operators(_: Path) -> Any:
    w, x = floats(6, 64), floats(3, 61).requires_grad_()
    packed, scales = squish_nf4.quantize_nf4(w)
    y = squish_nf4.linear_nf4(x, packed, scales, floats(6))
    (dx,) = torch.autograd.grad(y.sum(), x)
    return packed, scales, squish_nf4.dequantize_nf4(packed, scales), y, dx


def batches(_: Path) -> Any:
    packed, scales = vmap(squish_nf4.quantize_nf4)(floats(4, 6, 64))
    return vmap(squish_nf4.dequantize_nf4)(packed, scales), vmap(OPS.linear_nf4)(floats(4, 3, 64), packed, scales)


def layers(_: Path) -> Any:
    dense = nn.Linear(65, 9, dtype=torch.float32)
    dense.weight, dense.bias = nn.Parameter(floats(9, 65)), nn.Parameter(floats(9))
    layer = NF4Linear.from_linear(dense, group_size=32)
    again = NF4Linear(65, 9, group_size=32, dtype=torch.float32)
    again.load_state_dict(layer.state_dict())
    again.load_state_dict(dense.state_dict())
    return again(floats(3, 65)), again.dequantize(), again.to_linear().weight, NF4Packer()(floats(6, 64))


def a_model(_: Path) -> Any:
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.float32), nn.GELU(), nn.Linear(32, 9, dtype=torch.float32))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    report = squish_nf4.quantize_model(model)
    y = model(floats(3, 64))
    squish_nf4.dequantize_model(model)
    return [layer.relative_rms_error for layer in report.layers], y, model(floats(3, 64))


def decompositions(_: Path) -> Any:
    table = squish_nf4.decompositions()
    packed, scales = OPS.quantize_nf4(floats(6, 64))
    return (
        table[OPS.dequantize_nf4.default](packed, scales),
        table[OPS.dequantize_nf4.default](packed, scales, dtype=torch.bfloat16),
        table[OPS.linear_nf4.default](floats(3, 61), packed, scales, floats(6)),
        table[OPS._linear_nf4_grad_x.default](floats(3, 6), packed, scales, 32, 61),
    )


def a_checkpoint(folder: Path) -> Any:
    folder.mkdir()
    tensors = {"w": floats(8, 64), "half": floats(8, 64).half(), "norm": floats(64) / 3, "double": floats(3).double()}
    save_file(tensors, folder / "model.safetensors")
    squish_nf4.convert(folder / "model.safetensors", folder / "converted")
    return squish_nf4.load_npy_dir(folder / "converted"), squish_nf4.load_npy_dir(folder / "converted", dtype="source")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("work", [operators, batches, layers, a_model, decompositions, a_checkpoint])
def test_results_do_not_depend_on_it(
    work: Callable[[Path], Any], default: torch.dtype, set_default: Callable[[torch.dtype], None], tmp_path: Path
) -> None:
    expected = work(tmp_path / "float32")
    set_default(default)
    torch.testing.assert_close(work(tmp_path / "other"), expected, rtol=0, atol=0)


def test_a_new_layer_follows_it_as_nn_linear_does(set_default: Callable[[torch.dtype], None]) -> None:
    set_default(torch.bfloat16)
    layer = NF4Linear(64, 6)
    assert (layer.bias.dtype, layer.dense_dtype, layer.scales.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_new_layer_refuses_one_that_it_does_not_compute_in(set_default: Callable[[torch.dtype], None]) -> None:
    set_default(torch.float64)
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        NF4Linear(64, 6)
