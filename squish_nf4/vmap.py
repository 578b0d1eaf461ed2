"""torch.vmap of the operators: one call for a batch of activations or of whole weights, and one for each entry of
anything else. In Python, because torch's C++ headers for this need a library that its wheels do not contain."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.squish
_Dims = tuple[int | None, ...]  # of each argument the dimension that is the batch, or None


def register() -> None:
    """Called once, when the package is imported. Not for dequantize_nf4.out: torch.vmap takes no out=."""
    torch.library.register_vmap("squish::quantize_nf4", _quantize)
    torch.library.register_vmap("squish::dequantize_nf4", _dequantize)
    torch.library.register_vmap("squish::linear_nf4", partial(_linear, _OPS.linear_nf4))
    torch.library.register_vmap("squish::_linear_nf4_grad_x", partial(_linear, _OPS._linear_nf4_grad_x))


def _quantize(info: Any, dims: _Dims, w: Tensor, *group_size: int) -> Any:
    """The rows of all weights are the rows of one."""
    if dims[0] is None or w.dim() != 3:
        return _one_call_each(_OPS.quantize_nf4, info, dims, w, *group_size)
    w = w.movedim(dims[0], 0)
    results = _OPS.quantize_nf4(w.flatten(0, 1), *group_size)
    return tuple(result.unflatten(0, w.shape[:2]) for result in results), (0, 0)


def _dequantize(info: Any, dims: _Dims, packed: Tensor, scales: Tensor, *group_size: int, **dtype: Any) -> Any:
    if dims[0] is None or dims[1] is None or packed.dim() != 3 or scales.dim() != 3:
        return _one_call_each(_OPS.dequantize_nf4, info, dims, packed, scales, *group_size, **dtype)
    packed, scales = packed.movedim(dims[0], 0), scales.movedim(dims[1], 0)
    dense = _OPS.dequantize_nf4(packed.flatten(0, 1), scales.flatten(0, 1), *group_size, **dtype)
    return dense.unflatten(0, packed.shape[:2]), 0


def _linear(operator: Any, info: Any, dims: _Dims, x: Tensor, *others: Any) -> Any:
    """x, or the dy of the gradient, takes the batch as one more leading dimension."""
    if dims[0] is None or x.dim() < 2 or any(dim is not None for dim in dims[1:]):
        return _one_call_each(operator, info, dims, x, *others)
    return operator(x.movedim(dims[0], 0), *others), 0


def _one_call_each(operator: Any, info: Any, dims: _Dims, *args: Any, **kwargs: Any) -> Any:
    if info.batch_size == 0:
        raise ValueError(f"{operator}: vmap over an empty batch needs the batch in x alone, or in whole weights")
    results = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)), **kwargs)
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)  # quantize_nf4 gives two
