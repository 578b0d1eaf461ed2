"""torchao's NF4Tensor: NF4 with scales that are quantized once more; its product decodes the whole weight first.

Its fast 4-bit product on a CPU is the one of torch (int4pack), which has a plug-in of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.base import Codec, Layer, Linear, Peer, from_module

GROUPS_PER_SCALE = 256


class TorchAO(Peer):
    name = "torchao NF4"
    note = "NF4Tensor, whose scales are quantized once more; it decodes the whole weight for each product"
    install = "scripts/peers.sh, or pip install torchao"
    module = "torchao"
    slow = True

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear | None:
        if w.numel() % (group_size * GROUPS_PER_SCALE):
            return None

        def another() -> Layer:
            weight = nf4_tensor(w.to(dtype), group_size)
            return from_module(lambda x: F.linear(x, weight))

        decoded = nf4_tensor(w.to(dtype), group_size).get_original_weight().float()
        return Linear(decoded, w.numel() * dtype.itemsize, another)  # it writes the dense weight

    def codec(self, dtype: torch.dtype, group_size: int) -> Codec:
        return Codec(lambda w: nf4_tensor(w, group_size), lambda stored: stored.get_original_weight())  # type: ignore[attr-defined]


def nf4_tensor(w: Tensor, group_size: int) -> Any:
    quantization: Any = import_module("torchao.quantization")
    return quantization.NF4Tensor.from_tensor(w, group_size, GROUPS_PER_SCALE)
