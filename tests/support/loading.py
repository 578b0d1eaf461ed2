"""Models to be filled from a squish directory: a directory made of one, and whether one is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from squish_nf4 import convert
from squish_nf4.torchscript.comparison import have_same_bits


def converted(model: nn.Module, path: Path, **options: object) -> Path:
    """A directory made of the model's state."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path.with_suffix(".safetensors"))
    convert(path.with_suffix(".safetensors"), path, outlier_threshold=float("inf"), **options)  # type: ignore[arg-type]
    return path


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def state_of(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Which objects a model holds and their values; meta tensors by their identity alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), t.detach() if t.is_meta else t.detach().clone()) for name, t in tensors.items()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (identity, values) in after.items():
        assert identity == before[name][0], name
        assert values.is_meta or have_same_bits(values, before[name][1]), name
