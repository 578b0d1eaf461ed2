"""The operators written in plain torch, for exporters and backends that do not know them. Slower, and each call makes
the dense weight; a program that may load the op library does not need them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_map_only

_OPS = torch.ops.squish
_Levels = Callable[[torch.device], Tensor]  # _levels_of_bytes on a device


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """What the operators compute, in operators of torch alone; they refuse what the operators refuse.

    For ``program.run_decompositions(table)`` after torch.export, and ``make_fx(function, decomposition_table=table)``.
    The packed bytes stay bytes in the program. docs/compile-and-export.md shows an ONNX export.

    Returns:
        A table of dequantize_nf4, dequantize_nf4.out (the same bits as the operator), linear_nf4 and its gradient (the
        same numbers: a product in float32, the bias added in float32, one rounding). quantize_nf4 is not in it.
    """
    levels = _levels_for_programs()
    functions: dict[OpOverload, Callable[..., Any]] = {
        _OPS.dequantize_nf4.default: _dequantize,
        _OPS.dequantize_nf4.out: _dequantize_out,
        _OPS.linear_nf4.default: _linear,
        _OPS._linear_nf4_grad_x.default: _linear_grad_x,
    }
    return {operator: partial(_checked, operator, function, levels) for operator, function in functions.items()}


def _checked(operator: OpOverload, function: Callable[..., Any], levels: _Levels, *args: Any, **kwargs: Any) -> Any:
    """The operator's own checks, on tensors without memory; they leave nothing in the program.

    A layer's weight refuses what its bytes do not stand for; to a decomposition they are bytes.
    """
    with DisableTorchFunctionSubclass():
        with disable_proxy_modes_tracing():
            without_memory = tree_map_only(Tensor, _on_meta, (args, kwargs))
            operator(*without_memory[0], **without_memory[1])
        return function(levels, *args, **kwargs)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _levels_of_bytes() -> Tensor:
    """(256, 2): the levels of the two columns that a byte holds, decoded by the operator itself."""
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").view(256, 1)
    levels: Tensor = _OPS.dequantize_nf4(every_byte, torch.ones(256, 1, dtype=torch.float32, device="cpu"), 2)
    return levels


def _levels_for_programs() -> _Levels:
    """The table of levels: one constant that all layers share, or written out for torch before 2.14, which drops it."""
    levels = _levels_of_bytes()
    return levels.to if torch.__version__ >= "2.14" else _written_out(levels)


def _written_out(levels: Tensor) -> _Levels:
    """The table of levels made of 16 scalars, in operators that a program can hold without a constant."""
    fast = 0 if levels[0, 0] != levels[1, 0] else 1  # the column that changes from one byte to the next
    scalars = levels[:16, fast].tolist()

    def table(device: torch.device) -> Tensor:
        line = torch.stack([torch.full((), scalar, dtype=torch.float32, device=device) for scalar in scalars])
        columns = torch.meshgrid(line, line, indexing="xy" if fast == 0 else "ij")
        return torch.stack(columns, dim=2).reshape(256, 2)

    return table


def _dequantize(
    levels: _Levels, packed: Tensor, scales: Tensor, group_size: int = 32, *, dtype: torch.dtype | None = None
) -> Tensor:
    groups = torch.embedding(levels(packed.device), packed.int())
    groups = groups.reshape(scales.size(0), scales.size(1), group_size) * scales.unsqueeze(2)
    dense = groups.reshape(packed.size(0), packed.size(1) * 2).to(torch.float32 if dtype is None else dtype)
    return torch.where(dense.isnan(), torch.nan, dense)  # one NaN, whichever the processor makes


def _dequantize_out(levels: _Levels, packed: Tensor, scales: Tensor, group_size: int = 32, *, out: Tensor) -> Tensor:
    return out.copy_(_dequantize(levels, packed, scales, group_size, dtype=out.dtype))


def _linear(
    levels: _Levels, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, group_size: int = 32
) -> Tensor:
    weight = _dequantize(levels, packed, scales, group_size)[:, : x.size(-1)]  # without the padding
    y = x.float() @ weight.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _linear_grad_x(levels: _Levels, dy: Tensor, packed: Tensor, scales: Tensor, group_size: int, d: int) -> Tensor:
    weight = _dequantize(levels, packed, scales, group_size)[:, :d]
    return (dy.float() @ weight).to(dy.dtype)
