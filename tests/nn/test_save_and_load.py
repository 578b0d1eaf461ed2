"""Saving a quantized model and loading it in another process without memory for the dense one: README's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from squish_nf4 import NF4Linear, quantize_model
from tests.support.models import Rotary, Tied, WithBuffers
from tests.support.processes import run_python

pytestmark = pytest.mark.sweeps  # what is saved is loaded in a fresh process

TOKENS = torch.arange(32).reshape(2, 16)

LOAD = """
import sys, torch
from safetensors.torch import load_file
import squish_nf4
from tests.support.models import Rotary, WithBuffers
state, expected = sys.argv[1:]

with torch.device("meta"):
    model = WithBuffers()
report = squish_nf4.quantize_model(model)
print(*report.notes)
model.load_state_dict(load_file(state), strict=True, assign=True)
model.rotary = Rotary()
model.eval()

left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
assert left == [], left
inputs, outputs = torch.load(expected)
assert torch.equal(model(inputs), outputs)

model.to(torch.bfloat16)(inputs)
model.requires_grad_(True)
model(inputs).sum().backward()
squish_nf4.dequantize_model(model)
assert model(inputs).dtype == torch.bfloat16
print("equal")
"""


def test_a_model_saved_here_is_loaded_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    model = WithBuffers()
    model(torch.randint(50, (4, 16)))  # batch statistics that are not the initial ones
    model.eval()
    assert quantize_model(model).notes == ()
    with torch.no_grad():
        torch.save((TOKENS, model(TOKENS)), tmp_path / "expected.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    printed = run_python(LOAD, tmp_path / "model.safetensors", tmp_path / "expected.pt").splitlines()
    assert printed == ["on meta and in no state_dict, build again after loading: rotary.positions", "equal"]


LOAD_TIED = """
import sys, torch
from safetensors.torch import load_file
import squish_nf4
from tests.support.models import Rotary, Tied
state, expected = sys.argv[1:]

with torch.device("meta"):
    model = Tied()
squish_nf4.quantize_model(model)
missing, unexpected = model.load_state_dict(load_file(state), strict=False, assign=True)
assert (missing, unexpected) == (["lm_head.weight"], [])
model.lm_head.weight = model.embed.weight
model.rotary = Rotary()

assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
inputs, outputs = torch.load(expected)
assert torch.equal(model.eval()(inputs), outputs)
print("equal")
"""


def test_a_tied_model_is_saved_once_and_tied_again_in_a_fresh_process(tmp_path: Path) -> None:
    model = Tied().eval()
    quantize_model(model)
    assert model.lm_head.weight is model.embed.weight
    with torch.no_grad():
        torch.save((TOKENS, model(TOKENS)), tmp_path / "expected.pt")
    state = model.state_dict()
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    assert run_python(LOAD_TIED, tmp_path / "model.safetensors", tmp_path / "expected.pt") == "equal\n"


def test_the_file_holds_the_packed_bytes_and_not_the_dense_weights(tmp_path: Path) -> None:
    model = WithBuffers()
    quantize_model(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert (state["body.0.weight"].dtype, state["body.0.weight"].shape) == (torch.uint8, (130, 32))
    assert (state["body.0.scales"].dtype, state["body.0.scales"].shape) == (torch.float32, (130, 1))
    assert state["lm_head.weight"].dtype == torch.float32
    stored = sum(t.nbytes for t in model.state_dict().values())
    assert stored <= (tmp_path / "model.safetensors").stat().st_size < stored + 10_000


def test_a_state_of_another_group_size_is_refused_by_name_and_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    saved = WithBuffers()
    quantize_model(saved, group_size=16)
    with torch.device("meta"):
        model = WithBuffers()
    quantize_model(model, group_size=64)
    with pytest.raises(
        RuntimeError, match=r"NF4Linear 'body.0': packed weight .* do not fit;.*group_size=64"
    ) as caught:
        model.load_state_dict(saved.state_dict(), strict=True, assign=True)
    assert "(the state has group_size=16)" in str(caught.value)
    assert model.body[0].weight.is_meta


def test_a_dense_state_fills_the_empty_structure_too() -> None:
    dense = WithBuffers().eval()
    with torch.device("meta"):
        model = WithBuffers()
    quantize_model(model)
    model.load_state_dict(dense.state_dict(), strict=True, assign=True)
    model.rotary = Rotary()
    quantize_model(dense)
    assert torch.equal(model.eval()(TOKENS), dense(TOKENS))


def test_a_state_of_a_quantized_model_is_refused_by_the_dense_model() -> None:
    model = WithBuffers()
    quantize_model(model)
    with pytest.raises(RuntimeError, match=r"body\.0\.scales"):
        WithBuffers().load_state_dict(model.state_dict())


def tied_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_are_stored_once_by_save_model_and_tied_again_by_load_model(tmp_path: Path) -> None:
    model, again = tied_model(), tied_model()
    quantize_model(model)
    quantize_model(again)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert len([name for name in load_file(tmp_path / "model.safetensors") if name in ("0.weight", "2.weight")]) == 1
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    assert again[0].weight is again[2].weight
    assert isinstance(again[0], NF4Linear)
