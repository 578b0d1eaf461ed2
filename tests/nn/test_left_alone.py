"""What quantize_model leaves alone beside heads and layers that are read, what that costs, and what the report says."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from squish_nf4.model.choose import replaceable
from squish_nf4.model.report import LeftAlone, QuantizeReport
from tests.support.helpers import names, reasons, required_module

# --- what is being trained --------------------------------------------------------------------------------------------

TRAINED = "it is being trained, while others are frozen; name it in only to quantize it"


class Adapted(nn.Module):
    """A layer with a low-rank adapter, as somebody might write it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64, bias)
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(*frozen: str) -> nn.Module:
    model = nn.Sequential(Adapted(), nn.LayerNorm(64), Adapted(), nn.Linear(64, 4))
    for name, module in model.named_modules():
        if name.split(".")[-1] in frozen:
            module.requires_grad_(False)
    return model


def test_adapters_over_frozen_layers_stay_trainable() -> None:
    model = adapted("base")
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    report = quantize_model(model)
    assert names(report) == ["0.base", "2.base"]
    assert reasons(report) == dict.fromkeys(("0.down", "0.up", "2.down", "2.up", "3"), TRAINED)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    model(torch.randn(3, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapters_of_peft_stay_trainable() -> None:
    peft = required_module("peft")
    model = peft.get_peft_model(adapted(), peft.LoraConfig(target_modules=["base"], r=4))
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 4
    report = quantize_model(model)
    for name, reason in reasons(report).items():
        if "lora_" in name:  # the forward of peft reads the dtype of lora_A: no advice
            assert reason == ("it is being trained, while others are frozen" if "lora_A" in name else TRAINED)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert len(report.layers) == 7


@pytest.mark.parametrize("frozen", [(), ("base", "down", "up", "1", "3")], ids=["nothing frozen", "all frozen"])
def test_a_model_that_is_all_trainable_or_all_frozen_is_quantized_whole(frozen: tuple[str, ...]) -> None:
    assert len(quantize_model(adapted(*frozen)).layers) == 7


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 64, 64))


FROZEN: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.LayerNorm(64),
    "conv": lambda: nn.Conv1d(4, 4, 3),
    "linear": lambda: nn.Linear(64, 64),
    "embedding": lambda: nn.Embedding(10, 64),
    "lstm": lambda: nn.LSTM(64, 64),
    "experts": Experts,
}


@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_layer_of_any_kind_counts(kind: str) -> None:
    model = nn.ModuleDict({"frozen": FROZEN[kind]().requires_grad_(False), "head": nn.Linear(64, 64)})
    assert reasons(quantize_model(model))["head"] == TRAINED


class FreezesItself(nn.Module):
    """As models of transformers do at construction."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(10, 64).requires_grad_(False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, 64), requires_grad=False)
        self.correction = nn.Parameter(torch.zeros(1, 64), requires_grad=False)
        self.layer = nn.Linear(64, 64)


def test_frozen_positions_and_rows_do_not_count() -> None:
    assert names(quantize_model(FreezesItself())) == ["layer"]


@pytest.mark.parametrize("only", [["down", "up"], ["*.down", "2.up", "0.u?"], "*"])
def test_only_overrules_training_of_what_it_names(only: Any) -> None:
    taken = names(quantize_model(adapted("base"), only=only))
    assert [name for name in taken if name[2:] in ("down", "up")] == ["0.down", "0.up", "2.down", "2.up"]


@pytest.mark.parametrize("only", ["0", ["0", "base"], "0.*"])
def test_a_pattern_of_what_holds_a_trained_layer_does_not_reach_it(only: Any) -> None:
    report = quantize_model(adapted("base"), only=only)
    assert {name for name in names(report) if not name.endswith("base")} == set()
    assert reasons(report)["0.down"] == TRAINED


def test_quantizing_twice_takes_what_is_left() -> None:
    model = adapted()
    quantize_model(model, only="base")
    report = quantize_model(model)
    assert names(report) == ["3", "0.down", "0.up", "2.down", "2.up"]
    assert report.notes == ()  # our own layers know what they read


def test_adapters_on_layers_in_nf4_stay_trainable() -> None:
    model = adapted()
    quantize_model(model, only="base")
    for layer in (model[0].base, model[2].base):
        layer.requires_grad_(False)  # its bias: all that an adapter library can freeze of it
    assert names(quantize_model(model)) == []


# --- what a layer holds and is ----------------------------------------------------------------------------------------


def with_extra(kind: str) -> nn.Linear:
    layer = nn.Linear(64, 64)
    if kind == "buffer":
        layer.register_buffer("steps", torch.ones(3))
    elif kind == "parameter":
        layer.gain = nn.Parameter(torch.ones(64))
    else:
        layer.norm = nn.LayerNorm(64)
    return layer


@pytest.mark.parametrize("kind", ["buffer", "parameter", "child"])
def test_a_layer_on_which_somebody_hung_more_is_left_alone(kind: str) -> None:
    model = nn.Sequential(with_extra(kind), nn.Linear(64, 64))
    state = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("0.")}
    report = quantize_model(model)
    hung = {"buffer": "steps", "parameter": "gain", "child": "norm"}[kind]
    assert reasons(report) == {"0": f"it holds more than a weight and a bias: {hung}"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    found, dense = replaceable(model, lambda name: True)
    assert found == []
    assert dense == {"0.weight": f"it holds more than a weight and a bias: {hung}"}


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Penalized(nn.Linear):
    strength = 0.1

    def penalty(self) -> Tensor:
        return self.weight.pow(2).sum()

    @property
    def norm(self) -> Tensor:
        return self.weight.norm()


class Repeated(nn.Linear):
    """It defines what an NF4Linear has as well."""

    def __init__(self) -> None:
        super().__init__(64, 64)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return "repeated"


def test_a_layer_that_has_what_no_linear_layer_has_is_left_alone() -> None:
    model = nn.ModuleDict({"called": Called(64, 64), "penalized": Penalized(64, 64), "repeated": Repeated()})
    model["scaled"], model["loaded"] = nn.Linear(64, 64), nn.Linear(64, 64)
    model["scaled"].scaling, model["loaded"]._is_hf_initialized = 2.0, True
    report = quantize_model(model)
    assert names(report) == ["repeated", "loaded"]
    assert reasons(report) == {
        "called": "Called has what nn.Linear has not: __call__",
        "penalized": "Penalized has what nn.Linear has not: norm, penalty, strength",
        "scaled": "Linear has what nn.Linear has not: scaling",
    }


def test_a_weight_with_hooks_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    model[1].weight.register_post_accumulate_grad_hook(lambda _: None)
    report = quantize_model(model)
    assert reasons(report) == dict.fromkeys("01", "its weight has hooks")


class Labelled(Tensor):
    pass


def test_a_weight_that_is_no_plain_parameter_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(torch.randn(64, 64).as_subclass(Labelled))
    model[2].weight = nn.Parameter(torch.eye(64).to_sparse())
    report = quantize_model(model)
    assert names(report) == ["0"]
    assert reasons(report) == {"1": "its weight is a Labelled", "2": "its weight is torch.sparse_coo"}


def test_a_bias_that_is_spread_over_the_rows_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].bias = nn.Parameter(torch.ones(1))
    assert reasons(quantize_model(model)) == {"0": "its bias has shape (1,)"}


class Closed(nn.Module):
    """Nobody replaces its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(64, 64)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_modules", {}):
            raise AttributeError("closed")
        super().__setattr__(name, value)


def test_a_parent_that_refuses_another_child_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Closed())
    before = dict(model.named_modules())
    with pytest.raises(AttributeError, match="closed"):
        quantize_model(model)
    assert dict(model.named_modules()) == before


def test_a_layer_whose_state_somebody_changes_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].register_state_dict_post_hook(lambda *_: None)
    model[1].register_load_state_dict_post_hook(lambda *_: None)
    assert names(quantize_model(model)) == ["2"]


@pytest.mark.parametrize("shape", [(2, 64, 64), (64,), (32, 64), (0,)], ids=str)
def test_a_weight_of_another_shape_is_left_alone_and_the_rest_is_quantized(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(torch.randn(shape))
    report = quantize_model(model)
    assert names(report) == ["0", "2"]
    assert reasons(report) == {"1": f"its weight has shape {shape}, and the layer says that it is (64, 64)"}


# --- memory and time --------------------------------------------------------------------------------------------------


def test_each_dense_weight_is_freed_when_its_layer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    from_linear = NF4Linear.from_linear

    def counting(*args: Any) -> NF4Linear:
        alive.append(sum(weight() is not None for weight in weights))
        return from_linear(*args)

    monkeypatch.setattr(NF4Linear, "from_linear", counting)
    quantize_model(model)
    assert alive == [*range(16, 0, -1)]
    assert not any(weight() is not None for weight in weights)


def calls_of(function: Callable[[], Any]) -> int:
    """How many Python functions are called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def blocks(count: int) -> nn.Module:
    return nn.Sequential(*(nn.ModuleDict({"up": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(count)))


WALKS: dict[str, Callable[[nn.Module], Any]] = {
    "quantize_model": quantize_model,
    "of load_into": lambda model: replaceable(model, lambda name: True),
    "dequantize_model": dequantize_model,
}


@pytest.mark.parametrize("walk", WALKS)
def test_the_work_grows_with_the_model_and_no_faster(walk: str) -> None:
    models = [blocks(count) for count in (20, 40, 80)]
    if walk == "dequantize_model":
        for model in models:
            quantize_model(model)
    _, middle, large = (calls_of(lambda model=model: WALKS[walk](model)) for model in models)
    assert large < 2.1 * middle


# --- the report -------------------------------------------------------------------------------------------------------


def mixture() -> nn.Module:
    layers = [nn.ModuleDict({"experts": Experts(), "router": nn.Linear(64, 4)}) for _ in range(3)]
    return nn.ModuleDict({"embed": nn.Embedding(10, 64), "layers": nn.ModuleList(layers), "lm_head": nn.Linear(64, 10)})


def test_the_report_weighs_what_was_left_alone_the_heaviest_first() -> None:
    report = quantize_model(mixture(), skip="layers.1.router")
    assert [line for line in str(report).splitlines() if line.startswith("left alone")] == [
        "left alone: layers.*.experts (3 modules): 196.6 kB: Experts is not nn.Linear",
        "left alone: lm_head: 2.6 kB: an output head; name it in only to quantize it",
        "left alone: embed: 2.6 kB: Embedding is not nn.Linear",
        "left alone: layers.1.router: 1.0 kB: skip names it",
    ]
    assert {entry.name: entry.bytes for entry in report.left_alone}["layers.2.experts"] == 4 * 64 * 64 * 4


def test_the_last_line_says_how_much_of_the_rest_is_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(4, 64))
    report = quantize_model(model)
    packed, dense = 64 * 32 + 64 * 4, 4 * 64 * 4
    assert (report.bytes_after, report.bytes_dense) == (packed + dense, dense)
    assert str(report).splitlines()[-1].endswith(", of which 31% are dense")
    dequantize_model(model)
    assert quantize_model(model, skip="*").bytes_dense == 64 * 64 * 4 + dense
    assert str(quantize_model(nn.ReLU())).endswith("0.0 MB -> 0.0 MB, of which 0% are dense")


def test_large_sizes_read_well() -> None:
    entries = tuple(LeftAlone(f"model.layers.{i}.mlp.experts", "it is so", 2_818_750_000) for i in range(32))
    text = str(QuantizeReport((), entries, (), 1, 1, 1))
    assert "left alone: model.layers.*.mlp.experts (32 modules): 90.2 GB: it is so" in text


def test_names_and_reasons_keep_their_numbers_where_they_stand_alone() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a1", "b")})
    model["b"].weight = model["a1"].weight
    report = quantize_model(model, skip="a1")
    assert "left alone: b: 16.6 kB: its weight is tied to a1.weight" in str(report)
