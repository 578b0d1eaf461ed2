"""NF4Linear as a program: TorchScript, trace, torch.fx, and TorchScript where only the op library is loaded."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from squish_nf4 import NF4Linear, library_path
from tests.fresh_process import run_python

JIT = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is deprecated:FutureWarning")
SIZES = [(64, 64), (65, 32), (7, 64)]  # in_features, group_size: whole groups, padding, an effective group size
BATCHES = [1, 3, 40]


def model_of(in_features: int = 65, group_size: int = 32) -> nn.Sequential:
    return nn.Sequential(
        NF4Linear(in_features, 33, group_size=group_size), nn.GELU(), NF4Linear(33, 9, bias=False)
    ).eval()


def saved_and_loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@JIT
@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_a_scripted_model_gives_the_same_bits(in_features: int, group_size: int) -> None:
    model = model_of(in_features, group_size)
    scripted = torch.jit.script(model)
    for module in (scripted, saved_and_loaded(scripted), torch.jit.freeze(scripted)):
        for m in BATCHES:
            x = torch.randn(2, m, in_features)
            assert torch.equal(module(x), model(x))


@JIT
def test_a_traced_model_gives_the_same_bits_at_other_sizes() -> None:
    model = model_of()
    traced = torch.jit.trace(model, torch.randn(4, 65))
    for m in BATCHES:
        x = torch.randn(m, 65)
        assert torch.equal(saved_and_loaded(traced)(x), model(x))


@JIT
def test_a_scripted_layer_shows_its_sizes_and_refuses_another_width() -> None:
    scripted = torch.jit.script(NF4Linear(65, 9, group_size=32))
    assert (scripted.in_features, scripted.out_features, scripted.group_size) == (65, 9, 32)
    with pytest.raises(torch.jit.Error, match="NF4Linear: x has 66 columns, but in_features is 65"):
        scripted(torch.randn(3, 66))


@JIT
def test_a_scripted_layer_that_is_cast_afterwards_is_refused_and_never_computed() -> None:
    scripted = torch.jit.script(NF4Linear(65, 9)).half()
    with pytest.raises(RuntimeError, match="linear_nf4: scales must be float32, got float16"):
        scripted(torch.randn(3, 65).half())


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


@JIT
def test_a_scripted_model_runs_where_only_the_op_library_is_loaded(tmp_path: Path) -> None:
    model = model_of()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    inputs = [torch.randn(m, 65) for m in BATCHES]
    torch.save([(x, model(x).detach()) for x in inputs], tmp_path / "data.pt")
    assert run_python(ONLY_THE_OP_LIBRARY, library_path(), tmp_path / "model.pt", tmp_path / "data.pt") == "equal\n"


def test_symbolic_tracing_keeps_the_layer_as_one_call_that_checks_the_width() -> None:
    model = model_of()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 65)
    assert torch.equal(traced(x), model(x))
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 2
    with pytest.raises(ValueError, match="NF4Linear: x has 64 columns, but in_features is 65"):
        traced(x[:, :64])
