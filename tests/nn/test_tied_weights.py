"""quantize_model on weights, biases and modules that a model holds at more than one place: what is tied stays tied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from tests.support.helpers import names, reasons, through_pickle, through_torch_save


def test_tied_linears_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    report = quantize_model(model)
    assert names(report) == ["0", "2"]
    assert model[0].weight is model[2].weight
    assert model[0].scales is model[2].scales
    assert model[0].bias is not model[2].bias
    assert report.bytes_after == 64 * 32 + 64 * 4 + 2 * 64 * 4
    dequantize_model(model)
    assert model[0].weight is model[2].weight


def test_a_linear_tied_to_an_embedding_is_left_alone_with_the_name_of_it() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(50, 64), "head": nn.Linear(64, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    report = quantize_model(model)
    assert names(report) == []
    assert reasons(report)["head"] == "its weight is tied to embed.weight"
    assert model["head"].weight is model["embed"].weight
    assert names(quantize_model(model, only="head")) == ["head"]  # told to
    assert model["embed"].weight.dtype == torch.float32


def test_a_linear_tied_to_one_that_stays_dense_is_left_alone() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "c")})
    model["b"].weight = model["c"].weight = model["a"].weight
    report = quantize_model(model, skip="b")
    assert names(report) == []
    assert reasons(report) == {
        "a": "its weight is tied to b.weight",
        "b": "skip names it",
        "c": "its weight is tied to b.weight",
    }


def test_a_module_at_two_places_is_one_layer_at_both() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = quantize_model(model)
    assert names(report) == ["a"]
    assert type(model["a"]) is NF4Linear
    assert model["a"] is model["b"][0]
    assert dequantize_model(model) == ("a", "b.0")
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]


def test_a_module_at_two_places_is_skipped_by_either_name() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert names(quantize_model(model, skip="b")) == []


def test_untying_by_only_is_noted() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = quantize_model(model, only="0")
    assert report.notes == ("0.weight was tied to 1.weight, which stays dense: they are separate now",)


def test_tied_biases_stay_tied_there_and_back() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    bias = model[0].bias
    quantize_model(model)
    assert model[0].bias is bias
    assert model[1].bias is bias
    dequantize_model(model)
    assert model[0].bias is bias
    assert model[1].bias is bias


@pytest.mark.parametrize("copy_of", [through_pickle, through_torch_save], ids=["pickle", "torch.save"])
def test_tied_weights_stay_tied_through(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quantize_model(model)
    again = copy_of(model)
    assert type(again[0].weight) is type(model[0].weight)
    assert again[0].weight is again[1].weight
    assert torch.equal(again[0].weight, model[0].weight)
