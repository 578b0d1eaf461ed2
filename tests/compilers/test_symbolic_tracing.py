"""NF4Linear under torch.fx symbolic tracing. TorchScript: test_torchscript.py; compile and export: test_compile.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from squish_nf4 import NF4Linear


def test_symbolic_tracing_keeps_the_layer_as_one_call_that_checks_the_width() -> None:
    model = nn.Sequential(NF4Linear(65, 33, group_size=32), nn.GELU(), NF4Linear(33, 9, bias=False)).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 65)
    assert torch.equal(traced(x), model(x))
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 2
    with pytest.raises(ValueError, match="NF4Linear: x has 64 columns, but in_features is 65"):
        traced(x[:, :64])
