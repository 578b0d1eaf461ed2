"""bitsandbytes: Linear4bit and the functions below it, the same NF4 at the same group size.

Products are its own compiled ones; those that it would fetch with the package ``kernels`` are not used.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Codec, Layer, Linear, Peer, from_module


class BitsAndBytes(Peer):
    name = "bitsandbytes"
    note = "Linear4bit, the same NF4; on this kind of CPU it multiplies float32 and float16 activations in bfloat16"
    install = "pip install bitsandbytes"
    module = "bitsandbytes"

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear | None:
        if w.size(1) % group_size:
            return None  # its groups run on from one row into the next
        layer = linear4bit(w, dtype, group_size).train(training)
        if not training:
            with torch.no_grad():
                layer(torch.zeros(1, w.size(1), dtype=dtype))  # its first call lays the weight out for the CPU

        def another() -> Layer:
            return from_module(copy.deepcopy(layer))

        return Linear(w, w.numel() // 2 + w.numel() // group_size * 4, another)

    def codec(self, dtype: torch.dtype, group_size: int) -> Codec:
        import bitsandbytes.functional as functional

        def quantize(w: Tensor) -> object:
            return functional.quantize_4bit(w, blocksize=group_size, quant_type="nf4")

        def dequantize(stored: Any) -> Tensor:
            result: Tensor = functional.dequantize_4bit(*stored)
            return result

        return Codec(quantize, dequantize)


def linear4bit(w: Tensor, dtype: torch.dtype, group_size: int) -> Any:
    nn: Any = import_module("bitsandbytes.nn")
    layer = nn.Linear4bit(w.size(1), w.size(0), bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = nn.Params4bit(
        w.to(dtype),
        requires_grad=False,
        quant_type="nf4",
        blocksize=group_size,
        compress_statistics=False,
    )
    return layer.to("cpu")
