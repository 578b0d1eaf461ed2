"""export_torchscript: what the example inputs may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from squish_nf4 import NF4Linear, export_torchscript
from squish_nf4.torchscript.refusals import TorchScriptError
from tests.support.scripts import load


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


class TakesPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = NF4Linear(64, 8)

    def forward(self, pair: Pair) -> Tensor:
        return self.layer(pair.x) * pair.scale


class TakesPairUnscriptably(TakesPair):
    def forward(self, pair: Pair, **options: Any) -> Tensor:
        return self.layer(pair.x) * pair.scale


def test_a_named_tuple_is_an_input_and_a_tuple_in_the_fresh_process(tmp_path: Path) -> None:
    model, pair = TakesPair().eval(), Pair(torch.randn(2, 64), torch.tensor(2.0))
    report = export_torchscript(model, tmp_path / "m.pt", (pair,))
    assert (report.route, report.same_bits) == ("scripted", True)
    assert torch.equal(load(tmp_path / "m.pt")(tuple(pair)), model(pair))
    traced = export_torchscript(TakesPairUnscriptably().eval(), tmp_path / "m2.pt", {"pair": pair})
    assert (traced.route, traced.same_bits, traced.free_dimensions) == ("traced", True, (0,))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("container", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_are_a_tensor_a_sequence_or_keywords(container: Any, tmp_path: Path) -> None:
    example = container(torch.randn(2, 64))
    assert export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", example).same_bits


@pytest.mark.usefixtures("here")
def test_a_model_that_writes_into_its_inputs_does_not_write_into_the_example(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    example = torch.zeros(3)
    assert export_torchscript(InPlace().eval(), tmp_path / "m.pt", example).same_bits
    assert torch.equal(example, torch.zeros(3))


WANTED = "example_inputs must be a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments"
INNER = (
    "must be a tensor, a number, a string, None, a torch.dtype or a torch.device, or a tuple, list or mapping of these"
)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (5, f"{WANTED}, got int"),
        (np.ones((2, 64)), f"{WANTED}, got numpy.ndarray"),
        ("abc", f"{WANTED}, got str"),
        ({1: torch.ones(1)}, f"{WANTED}, got a dict whose keys are no names"),
        ((torch.ones(1), None, None, np.bool_(False)), f"example_inputs[3] {INNER}, got numpy.bool"),
        ({"x": [torch.ones(1), np.float64(1)]}, f"example_inputs['x'][1] {INNER}, got numpy.float64"),
    ],
)
def test_example_inputs_that_torchscript_cannot_take_are_refused(example: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError) as caught:
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", example)
    assert str(caught.value) == f"export_torchscript: {message}"


def test_a_named_tuple_that_a_trace_would_forget_is_to_be_a_keyword_argument(tmp_path: Path) -> None:
    with pytest.raises(TorchScriptError, match="a NamedTuple keeps its names in a trace if it is a keyword argument"):
        export_torchscript(
            TakesPairUnscriptably().eval(), tmp_path / "m.pt", (Pair(torch.randn(2, 64), torch.ones(1)),)
        )
