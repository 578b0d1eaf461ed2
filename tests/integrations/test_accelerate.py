"""Quantized models under accelerate: made without memory, dispatched, offloaded to memory and to disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from squish_nf4 import quantize_model
from squish_nf4.nn.packed_weight import PackedWeight
from tests.support.helpers import required_module
from tests.support.models import Llama, quantized_llama, some_tokens

pytestmark = [pytest.mark.sweeps, pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")]
IN_MEMORY = ("embed", "norm", "lm_head", "layers.0", "frequencies")  # the last is a buffer


@pytest.fixture
def accelerate() -> Any:
    return required_module("accelerate")


def on_disk_in_part(accelerate: Any, model: nn.Module, folder: Path, **options: Any) -> Any:
    """A model without memory, filled from the state of ``model``, all but its first layer on disk."""
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights():
        empty = Llama().eval()
        quantize_model(empty, group_size=32)
    return accelerate.load_checkpoint_and_dispatch(
        empty,
        str(folder / "model.safetensors"),
        device_map=dict.fromkeys(IN_MEMORY, "cpu") | {"layers.1": "disk", "layers.2": "disk"},
        offload_folder=str(folder / "offloaded"),
        **options,
    )


@pytest.mark.parametrize("include_buffers", [False, True])
def test_a_model_is_quantized_without_memory(accelerate: Any, include_buffers: bool) -> None:
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = Llama()
        quantize_model(model, group_size=32)
    weight = model.layers[0].mlp.down_proj.weight
    assert type(weight) is PackedWeight
    assert weight.is_meta


def test_layers_on_disk_compute_the_same_bits(accelerate: Any, tmp_path: Path) -> None:
    model, tokens = quantized_llama(), some_tokens()
    filled = on_disk_in_part(accelerate, model, tmp_path, offload_buffers=True)
    assert filled.layers[1].mlp.down_proj.weight.is_meta
    assert torch.equal(filled(tokens), model(tokens))


def test_scales_that_accelerate_forgets_are_an_error_and_no_wrong_number(accelerate: Any, tmp_path: Path) -> None:
    """Without offload_buffers=True it leaves the buffers of what lies on disk behind on meta."""
    model = quantized_llama()
    with pytest.raises(ValueError, match="scales is on the meta device"):
        on_disk_in_part(accelerate, model, tmp_path)(some_tokens())


def test_offloading_to_memory_and_to_disk(accelerate: Any, tmp_path: Path) -> None:
    model, tokens = quantized_llama(), some_tokens()
    expected = model(tokens)
    moved = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert torch.equal(moved(tokens), expected)
    folder = str(tmp_path)
    moved = accelerate.disk_offload(copy.deepcopy(model), folder, execution_device="cpu", offload_buffers=True)
    assert torch.equal(moved(tokens), expected)
