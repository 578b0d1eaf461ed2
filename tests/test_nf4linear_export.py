"""NF4Linear as a program: export, compile, symbolic tracing. TorchScript: test_torchscript.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from squish_nf4 import NF4Linear

SIZES = [(64, 64), (65, 32), (7, 64)]  # in_features, group_size: whole groups, padding, an effective group size
BATCHES = [1, 3, 40]


def model_of(in_features: int = 65, group_size: int = 32) -> nn.Sequential:
    return nn.Sequential(
        NF4Linear(in_features, 33, group_size=group_size), nn.GELU(), NF4Linear(33, 9, bias=False)
    ).eval()


@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_it_exports_with_a_dynamic_batch(in_features: int, group_size: int) -> None:
    model = model_of(in_features, group_size)
    shapes = ({0: Dim("batch"), 1: Dim("tokens")},)
    program = export(model, (torch.randn(4, 5, in_features),), dynamic_shapes=shapes)
    assert "squish.linear_nf4" in program.graph_module.code  # the packed bytes, not a decoded weight
    assert {t.dtype for t in program.state_dict.values()} == {torch.uint8, torch.float32}
    for batch, tokens in [(0, 3), (1, 1), (2, 40)]:
        x = torch.randn(batch, tokens, in_features)
        assert torch.equal(program.module()(x), model(x))


def test_an_exported_program_is_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of()
    program = export(model, (torch.randn(4, 65),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(40, 65)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_it_compiles_whole_and_once_for_all_batches() -> None:
    model = model_of()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, *BATCHES[1:], 300):
        x = torch.randn(m, 65)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_symbolic_tracing_keeps_the_layer_as_one_call_that_checks_the_width() -> None:
    model = model_of()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 65)
    assert torch.equal(traced(x), model(x))
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 2
    with pytest.raises(ValueError, match="NF4Linear: x has 64 columns, but in_features is 65"):
        traced(x[:, :64])
