"""The operators in plain torch, for backends that do not know ``squish::``: ONNX, and compilers of other hardware.

A decomposition is a definition, not a kernel: it stores the decoded weight and is slow where it runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squish_nf4._C import codebook


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decomposition of every operator that computes with packed weights.

    For ``torch.export.ExportedProgram.run_decompositions(table)`` and ``make_fx(f, decomposition_table=table)``. The
    packed bytes stay inputs of the graph, uint8, and are decoded in it. dequantize_nf4 gives the operator's bits;
    linear_nf4 and its gradient give its numbers up to the order of a float32 summation. quantize_nf4 has none: it is
    run before a model is exported.
    """
    ops = torch.ops.squish
    return {
        ops.dequantize_nf4.default: _dequantize,
        ops.linear_nf4.default: _linear,
        ops._linear_nf4_grad_x.default: _linear_grad_x,
    }


def _decode(packed: Tensor, scales: Tensor) -> Tensor:
    """(n, columns) float32, whose groups are columns / scale columns wide."""
    levels = torch.stack([torch.full((), level, dtype=torch.float32, device=packed.device) for level in codebook()])
    byte = packed.to(torch.int64)  # ONNX runtimes gather by int64 alone
    index = torch.stack((byte % 16, byte // 16), dim=-1)
    n, columns = packed.size(0), packed.size(1) * 2
    group_size = columns // scales.size(1)
    values = levels[index].reshape(n, scales.size(1), group_size) * scales.unsqueeze(-1)
    return values.reshape(n, columns)


def _dequantize(packed: Tensor, scales: Tensor, group_size: int = 32, *, dtype: torch.dtype | None = None) -> Tensor:
    if packed.numel() == 0:
        return torch.zeros(packed.size(0), packed.size(1) * 2, dtype=dtype or torch.float32, device=packed.device)
    return _decode(packed, scales).to(dtype or torch.float32)


def _linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, group_size: int = 32) -> Tensor:
    weight = _dequantize(packed, scales, group_size)[:, : x.size(-1)]
    y = torch.matmul(x.to(torch.float32), weight.t())
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def _linear_grad_x(dy: Tensor, packed: Tensor, scales: Tensor, group_size: int, d: int) -> Tensor:
    weight = _dequantize(packed, scales, group_size)[:, :d]
    return torch.matmul(dy.to(torch.float32), weight).to(dy.dtype)
