"""load_into where a layer cannot be replaced: its weight is decoded, or nothing of the model changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from squish_nf4 import NF4Linear, load_into, load_npy_dir
from tests.support.loading import assert_unchanged, converted, on_meta, state_of


class Refusing(nn.Module):
    """Takes no other layer in the place of its last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(64, 8)
        self.norm = nn.LayerNorm(8)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "last" and isinstance(value, NF4Linear):
            raise RuntimeError("the last layer stays")
        super().__setattr__(name, value)


@pytest.mark.parametrize("make", [Refusing, lambda: on_meta(Refusing)], ids=["in memory", "on meta"])
def test_a_model_that_refuses_a_layer_is_left_as_it_was(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    path = converted(Refusing(), tmp_path / "dir")
    model = make()
    layers, before = dict(model.named_modules()), state_of(model)
    with pytest.raises(RuntimeError, match="the last layer stays"):
        load_into(model, path)
    assert_unchanged(model, before)
    assert dict(model.named_modules()) == layers


def with_weight(*shape: int) -> nn.Sequential:
    """A layer whose sizes are not those of its weight, which torch's forward does not ask."""
    model = nn.Sequential(nn.Linear(32, 6))
    model[0].weight = nn.Parameter(torch.zeros(shape))
    return model


def with_a_bias_of_another_kind() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 6))
    del model[0].bias
    model[0].register_buffer("bias", torch.zeros(6))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_weight(2, 3, 32), "its weight has shape (2, 3, 32), and the layer says that it is (6, 32)"),
        (lambda: with_weight(3, 32), "its weight has shape (3, 32), and the layer says that it is (6, 32)"),
        (lambda: with_weight(6, 16), "its weight has shape (6, 16), and the layer says that it is (6, 32)"),
        (with_a_bias_of_another_kind, "it holds more than a weight and a bias: bias"),
    ],
    ids=["3-D", "pruned rows", "pruned columns", "a buffer as bias"],
)
def test_a_layer_that_no_nf4_layer_can_be_made_of_gets_its_weight_decoded(
    tmp_path: Path, make: Callable[[], nn.Module], reason: str
) -> None:
    source = make()
    with torch.no_grad():
        source[0].weight.normal_(generator=torch.Generator().manual_seed(3))
    path = converted(source, tmp_path / "dir")
    model = make()
    assert load_into(model, path).decoded == {"0.weight": reason}
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, load_npy_dir(path)["0.weight"])
