"""torch itself: the dense layer, and its 4-bit product with a scale and a zero for each group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.base import Layer, Linear, Peer, from_module


class Dense(Peer):
    """F.linear with the decoded weights in the dtype of the activations."""

    name = "dense torch"
    note = "F.linear with the decoded weights in the dtype of the activations"

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear:
        dense = w.to(dtype)

        def another() -> Layer:
            weight = dense.clone()
            return from_module(lambda x: F.linear(x, weight))

        return Linear(w, dense.nbytes, another)


class Int4Pack(Peer):
    """torch._weight_int4pack_mm_for_cpu: 4-bit integers, evenly spaced between the extremes of a group."""

    name = "int4pack (torch)"
    note = "`torch._weight_int4pack_mm_for_cpu`: levels evenly spaced between the extremes of a group, not NF4"

    def missing(self) -> bool:
        return not hasattr(torch, "_weight_int4pack_mm_for_cpu")

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear | None:
        n, d = w.shape
        if training or group_size not in (32, 64, 128, 256) or d % group_size:
            return None
        groups = w.view(n, d // group_size, group_size)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-12).to(dtype).float()
        zero = (low + 8 * scale).to(dtype).float()
        integers = ((groups - zero) / scale).round().add(8).clamp(0, 15)
        decoded = ((integers - 8) * scale + zero).view(n, d)
        packed = torch._convert_weight_to_int4pack_for_cpu(integers.view(n, d).int(), 2)
        scales_and_zeros = torch.cat((scale, zero), 2).transpose(0, 1).contiguous().to(dtype)

        def another() -> Layer:
            bytes_, scales = packed.clone(), scales_and_zeros.clone()
            return from_module(lambda x: torch._weight_int4pack_mm_for_cpu(x, bytes_, group_size, scales))

        return Linear(decoded, packed.nbytes + scales_and_zeros.nbytes, another)
