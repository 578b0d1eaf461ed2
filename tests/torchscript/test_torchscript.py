"""Layers and models in TorchScript: scripted, traced, frozen, saved, moved. See also test_export.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squish_nf4 import NF4Linear, dequantize_nf4, library_path, quantize_model, quantize_nf4
from tests.support.helpers import require
from tests.support.models import quantized_llama, some_tokens
from tests.support.processes import run_python

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.[a-z_]+. is deprecated")

SIZES = [(64, 64), (65, 32), (7, 64)]  # in_features, group_size: whole groups, padding, an effective group size
BATCHES = [1, 3, 40]


def model_of(in_features: int = 65, group_size: int = 32) -> nn.Sequential:
    return nn.Sequential(
        NF4Linear(in_features, 33, group_size=group_size), nn.GELU(), NF4Linear(33, 9, bias=False)
    ).eval()


def saved_and_loaded(module: Any, device: str | None = None) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file, map_location=device)


def traced(model: nn.Module, *inputs: Tensor) -> Any:
    return torch.jit.trace(model, inputs)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "scripted": lambda model, x: torch.jit.script(model),
    "traced": traced,
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "optimized": lambda model, x: torch.jit.optimize_for_inference(torch.jit.script(model)),
    "copied": lambda model, x: copy.deepcopy(torch.jit.script(model)),
}


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_layers_give_the_same_bits(way: str, in_features: int, group_size: int) -> None:
    model = model_of(in_features, group_size)
    program = WAYS[way](model, torch.randn(2, 5, in_features))
    for module in (program, saved_and_loaded(program)):
        for m in BATCHES:
            x = torch.randn(2, m, in_features)
            for _ in range(3):  # TorchScript optimizes after the first call
                assert torch.equal(module(x), model(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_gives_the_same_bits(way: str, dtype: torch.dtype) -> None:
    model = quantized_llama(dtype)
    quantize_model(model, only="lm_head")  # optimize_for_inference hands dense layers to oneDNN: other bits
    program = WAYS[way](model, some_tokens())
    for module in (program, saved_and_loaded(program, "cpu")):
        for batch, tokens in [(2, 9), (2, 9), (1, 1), (3, 17)]:
            ids = some_tokens(batch, tokens)
            assert torch.equal(module(ids), model(ids))


ONLY_THE_OP_LIBRARY = """
import sys, torch
library, module, data = sys.argv[1:]
torch.ops.load_library(library)
model = torch.jit.load(module)
for x, expected in torch.load(data):
    assert torch.equal(model(x), expected)
x.requires_grad_()
model(x).sum().backward()
assert x.grad.shape == x.shape
assert "squish_nf4" not in sys.modules
print("equal")
"""


def test_a_scripted_model_runs_where_only_the_op_library_is_loaded(tmp_path: Path) -> None:
    model = model_of()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    inputs = [torch.randn(m, 65) for m in BATCHES]
    torch.save([(x, model(x).detach()) for x in inputs], tmp_path / "data.pt")
    assert run_python(ONLY_THE_OP_LIBRARY, library_path(), tmp_path / "model.pt", tmp_path / "data.pt") == "equal\n"


# --- gradients and states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize("loaded", [False, True], ids=["made here", "loaded"])
def test_gradients_are_those_of_eager(way: str, loaded: bool) -> None:
    model = model_of()
    module = WAYS[way](model, torch.randn(2, 65))
    module = saved_and_loaded(module) if loaded else module
    x, weights = torch.randn(3, 65), torch.randn(3, 9)
    gradients = []
    for program in (model, module):
        program.zero_grad()
        leaf = x.clone().requires_grad_()
        (program(leaf) * weights).sum().backward()
        assert leaf.grad is not None
        gradients.append([leaf.grad, *(p.grad for p in program.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 2  # of x and of the one bias
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", ["scripted", "traced", "copied"])
def test_the_state_dict_is_that_of_eager(way: str) -> None:
    model = quantized_llama()
    module = saved_and_loaded(WAYS[way](model, some_tokens()))
    expected, found = model.state_dict(), module.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in module.parameters() if p.dtype == torch.uint8)


def test_an_eager_layer_loads_the_state_of_a_scripted_one() -> None:
    model, other = model_of(), model_of()
    other.load_state_dict(torch.jit.script(model).state_dict())
    x = torch.randn(3, 65)
    assert torch.equal(other(x), model(x))


# --- devices and casts ------------------------------------------------------------------------------------------------


def test_map_location_meta_gives_shapes() -> None:
    module = saved_and_loaded(torch.jit.script(quantized_llama()), "meta")
    assert module(some_tokens(3, 17).to("meta")).shape == (3, 17, 128)


def test_a_model_of_a_gpu_runs_on_the_cpu_and_back() -> None:
    require("cuda", torch.cuda.is_available(), "no GPU")
    model = quantized_llama()
    ids = some_tokens()
    on_gpu = saved_and_loaded(torch.jit.script(model), "cuda")
    expected = copy.deepcopy(model).cuda()(ids.cuda())
    assert torch.equal(on_gpu(ids.cuda()), expected)
    assert torch.equal(saved_and_loaded(on_gpu, "cpu")(ids), model(ids))


@pytest.mark.parametrize("loaded", [False, True], ids=["made here", "loaded"])
def test_a_layer_that_is_cast_after_scripting_is_refused_and_never_computed(loaded: bool) -> None:
    scripted = torch.jit.script(NF4Linear(65, 9))
    module = (saved_and_loaded(scripted) if loaded else scripted).half()
    with pytest.raises(RuntimeError, match="linear_nf4: scales must be float32, got float16"):
        module(torch.randn(3, 65).half())


def test_a_forward_of_ones_own_dequantizes_with_the_operator() -> None:
    """Documented: TorchScript does not compile the keyword-only argument of squish_nf4.dequantize_nf4."""

    class Dequantizes(nn.Module):
        def forward(self, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
            half = torch.ops.squish.dequantize_nf4(packed, scales, 32, dtype=torch.float16)
            return torch.ops.squish.dequantize_nf4(packed, scales, 32), half

    packed, scales = quantize_nf4(torch.randn(4, 64), 32)
    for found, dtype in zip(torch.jit.script(Dequantizes())(packed, scales), (None, torch.float16), strict=True):
        assert torch.equal(found, dequantize_nf4(packed, scales, 32, dtype=dtype))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True], ids=["made here", "loaded"])
def test_a_scripted_layer_keeps_its_sizes_and_its_errors(loaded: bool) -> None:
    scripted = torch.jit.script(NF4Linear(65, 9, group_size=32))
    assert (scripted.in_features, scripted.out_features, scripted.group_size) == (65, 9, 32)
    module = saved_and_loaded(scripted) if loaded else scripted
    with pytest.raises(torch.jit.Error, match="NF4Linear: x has 66 columns, but in_features is 65"):
        module(torch.randn(3, 66))
    with pytest.raises(RuntimeError, match="linear_nf4: x must be float32, bfloat16 or float16, got float64"):
        module(torch.randn(3, 65).double())
    with pytest.raises(RuntimeError, match="linear_nf4: packed is on cpu but x is on meta"):
        module(torch.randn(3, 65, device="meta"))


def test_a_traced_layer_holds_no_check_of_the_width() -> None:
    """Documented: the operator cannot know how much of its last block is padding."""
    layer = NF4Linear(65, 9, group_size=32)
    program = traced(layer, torch.randn(3, 65))
    wider = torch.randn(3, 70)
    assert torch.equal(program(wider), layer(wider[:, :65]))  # the padding's weights are zero
    with pytest.raises(ValueError, match="NF4Linear: x has 70 columns"):
        layer(wider)
    with pytest.raises(RuntimeError, match="linear_nf4: x has 64 columns but packed holds 96"):
        program(wider[:, :64])
