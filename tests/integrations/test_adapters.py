"""Adapters of PEFT on quantized layers: they train, and a merge into packed bytes is refused in words of NF4."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from tests.support.helpers import reasons, require_transformers, required_module
from tests.support.transformers_models import GROUPED, TOKENS, gpt2, made

# Of PEFT and transformers, about each other.
OTHERS = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]
pytestmark = [pytest.mark.sweeps, *OTHERS]
TARGETS = ["q_proj", "up_proj"]
IDS = torch.arange(1, 7).reshape(1, 6)
Make = Callable[[Any], Any]

# Those whose merge assigns layer.weight.data were off by 0.64 (IA3), 0.75 (MiSS) and 1.19 (RoAd) without a word.
TRAINED: dict[str, Make] = {
    "LoRA": lambda peft: peft.LoraConfig(r=4, target_modules=TARGETS),
    "IA3": lambda peft: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "MiSS": lambda peft: peft.MissConfig(r=4, target_modules=TARGETS),
    "RoAd": lambda peft: peft.RoadConfig(target_modules=TARGETS, group_size=16),
    "AdaLora": lambda peft: peft.AdaLoraConfig(r=4, target_modules=TARGETS, total_step=10),
    "BOFT": lambda peft: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "VeRA": lambda peft: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "FourierFT": lambda peft: peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "C3A": lambda peft: peft.C3AConfig(block_size=16, target_modules=["q_proj"]),
}
# They begin with the dense weight: DoRA with its norms, HRA with its rotations, SHiRA by adding to some of it.
REFUSED: dict[str, Make] = {
    "DoRA": lambda peft: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "HRA": lambda peft: peft.HRAConfig(r=4, target_modules=TARGETS),
    "SHiRA": lambda peft: peft.ShiraConfig(r=4, target_modules=TARGETS),
}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """BOFT sets CXX=gcc to compile for a GPU, and leaves it set if that fails."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    require_transformers()
    torch.manual_seed(0)
    llama, _ = made("LlamaForCausalLM", TOKENS, **GROUPED)
    quantize_model(llama)
    return llama


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [module.weight.clone() for module in model.modules() if isinstance(module, NF4Linear)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 14
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_trains_and_is_not_merged_into_bytes(model: nn.Module, name: str) -> None:
    peft = required_module("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), TRAINED[name](peft))
    before = packed_bytes(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapted(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(RuntimeError, match="packed NF4 bytes"):
            merge()
    assert_same(packed_bytes(adapted), before)


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_needs_the_dense_weight_is_refused(model: nn.Module, name: str) -> None:
    peft = required_module("peft")
    adapted = copy.deepcopy(model)
    config = REFUSED[name](peft)
    with pytest.raises(RuntimeError, match="packed NF4 bytes"):
        peft.get_peft_model(adapted, config)(IDS)
    assert_same(packed_bytes(adapted), packed_bytes(model))


@pytest.mark.parametrize("order", ["quantize, then adapters", "adapters, then quantize"])
def test_a_conv1d_is_merged_right_after_it_is_dense_again(order: str) -> None:
    """An adapter on an NF4Linear takes it for an nn.Linear: what it wraps has to be one when it merges."""
    require_transformers()
    peft = required_module("peft")
    torch.manual_seed(0)
    adapted, _ = gpt2()
    config = peft.LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    if order == "quantize, then adapters":
        quantize_model(adapted)
        adapted = peft.get_peft_model(adapted, config)
    else:
        adapted = peft.get_peft_model(adapted, config)
        quantize_model(adapted)
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    expected = adapted(IDS).logits
    layer = adapted.base_model.model.transformer.h[0].attn
    assert isinstance(layer.c_proj.base_layer, NF4Linear)
    dequantize_model(adapted)
    wanted = "Linear" if order == "quantize, then adapters" else "Conv1D"
    assert type(layer.c_proj.base_layer).__name__ == wanted
    assert type(layer.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


# What is quantized below an adapter that was there first: nothing, where its forward reads the weight.
FIRST: dict[str, tuple[Make, str]] = {
    "LoRA": (TRAINED["LoRA"], ""),
    "IA3": (TRAINED["IA3"], ""),
    "VeRA": (TRAINED["VeRA"], ""),
    "LoHa": (lambda peft: peft.LoHaConfig(r=4, target_modules=["q_proj"]), "Linear reads its weight itself (layer.py:"),
    "LoKr": (lambda peft: peft.LoKrConfig(r=4, target_modules=["q_proj"]), "Linear reads its weight itself (layer.py:"),
    "HRA": (REFUSED["HRA"], "HRALinear reads its weight itself (layer.py:"),
    "SHiRA": (REFUSED["SHiRA"], "Linear reads its weight itself (tuners_utils.py:"),
    "DoRA": (REFUSED["DoRA"], "DoRA reads its weight itself"),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_layer_below_an_adapter_that_reads_it_stays_dense(name: str) -> None:
    require_transformers()
    peft = required_module("peft")
    make, reason = FIRST[name]
    llama, _ = made("LlamaForCausalLM", TOKENS, **GROUPED)
    adapted = peft.get_peft_model(llama, make(peft)).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    report = quantize_model(adapted, group_size=32)
    below = {name: why for name, why in reasons(report).items() if name.endswith("base_layer")}
    assert bool(below) == bool(reason)
    assert all(why.startswith(reason) for why in below.values())
    assert len(report.layers) + len(below) == 14
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
