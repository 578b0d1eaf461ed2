"""Whole models on a GPU: quantized, computed, loaded and exported there as on the CPU.

The same steps run on the CPU, too: so that it is the GPU, and not the test, that is tried for the first time there.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import squish_nf4
from tests.support.cuda_inputs import assert_same_bits
from tests.support.directories import save_shard
from tests.support.gpus import require_a_gpu
from tests.support.helpers import relative, require_transformers
from tests.support.models import Llama, eager_minilm, minilm_calls, quantized_llama, require_minilm, some_tokens
from tests.support.transformers_models import GROUPED, TOKENS, made

NEEDS_NO_GPU = True


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        require_a_gpu()
    return torch.device(request.param)


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert_same_bits(tensor.cpu(), states[1][name].cpu(), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_llama_that_is_quantized_there(device: torch.device, dtype: torch.dtype) -> None:
    dense = Llama().to(dtype).eval()
    on_cpu, model = copy.deepcopy(dense), dense.to(device)
    squish_nf4.quantize_model(on_cpu, group_size=32)
    squish_nf4.quantize_model(model, group_size=32)
    assert_same_state(model, on_cpu)
    tokens = some_tokens()
    with torch.no_grad():
        logits = model(tokens.to(device))
        assert logits.device.type == device.type
        assert relative(logits.cpu(), on_cpu(tokens).double()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_llama_learns_through_its_frozen_weights(device: torch.device) -> None:
    model = quantized_llama()
    model.requires_grad_(False)
    model.embed.requires_grad_(True)
    on_cpu, model = copy.deepcopy(model), model.to(device)
    tokens = some_tokens()
    for each in (on_cpu, model):
        each(tokens.to(each.embed.weight.device)).square().mean().backward()
    assert relative(model.embed.weight.grad.cpu(), on_cpu.embed.weight.grad.double()) < 1e-4


def test_transformers_llama_generates_the_same_tokens(device: torch.device) -> None:
    require_transformers()
    on_cpu, _ = made("LlamaForCausalLM", TOKENS, **GROUPED)
    squish_nf4.quantize_model(on_cpu)
    model = copy.deepcopy(on_cpu).to(device)
    tokens = torch.arange(1, 7).reshape(1, 6)
    found = model.generate(tokens.to(device), max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = on_cpu.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found.cpu(), expected)


def test_load_into_fills_a_model_there(device: torch.device, tmp_path: Path) -> None:
    dense = Llama().to(torch.bfloat16)
    shard = tmp_path / "model.safetensors"
    save_shard(shard, {name: tensor.contiguous() for name, tensor in dense.state_dict().items()})
    squish_nf4.convert(shard, tmp_path / "squish", group_size=32, passthrough=["lm_head.*", "embed.*"])
    models = []
    for where in (torch.device("cpu"), device):
        with where:
            model = Llama().to(torch.bfloat16)
        report = squish_nf4.load_into(model, tmp_path / "squish")
        assert len(report.nf4) == 7 * 3
        assert {tensor.device.type for tensor in model.state_dict().values()} == {where.type}
        models.append(model)
    assert_same_state(models[1], models[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_export_torchscript_gives_the_results_of_the_model(device: torch.device, tmp_path: Path) -> None:
    model = quantized_llama().to(device)
    tokens = some_tokens().to(device)
    report = squish_nf4.export_torchscript(model, tmp_path / "model.pt", tokens)
    assert report.route == "scripted"
    with torch.no_grad():
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert relative(loaded(tokens), model(tokens).double()) < 1e-5


def test_minilm_encodes_as_on_the_cpu(device: torch.device) -> None:
    require_minilm()
    on_cpu = eager_minilm()
    model = copy.deepcopy(on_cpu).to(device)
    with torch.no_grad():
        for ids, mask in minilm_calls((1, 9), (5, 17)):
            found = model(ids.to(device), mask.to(device))
            assert relative(found.cpu(), on_cpu(ids, mask).double()) < 1e-5
