"""A model's call with example inputs: made from what a user gives, copied for every run, and at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from squish_nf4.fresh_run import leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
Leaves = list[tuple[str, Any]]  # of a nested result: place and value


def as_call(example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Call:
    if isinstance(example_inputs, Mapping):
        return copied(((), dict(example_inputs)))
    return copied(((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {}))


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [with_tensors(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def copied(call: Call) -> Call:
    """A model may write into its inputs: every run gets its own."""
    copy: Call = with_tensors(call, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
    return copy


def run(module: Any, call: Call) -> Any:
    args, kwargs = copied(call)
    return module(*args, **kwargs)


def resized_calls(model: nn.Module, example: Call) -> dict[int, tuple[Call, Leaves]]:
    """The example with dimension 0, and with dimension 1, of another size, and eager's results, where eager takes it.

    A trace that has a size written into it passes the test at that size only.
    """
    calls: dict[int, tuple[Call, Leaves]] = {}
    for dimension in (0, 1):
        sizes = [t.size(dimension) for _, t in leaves(example) if isinstance(t, Tensor) and t.dim() > dimension]
        if not sizes or sizes[0] == 0:
            continue
        call = with_tensors(example, partial(resize, dimension=dimension, size=sizes[0]))
        try:
            calls[dimension] = call, list(leaves(run(model, call)))
        except Exception:  # the model has this size in it: so may the trace
            continue
    return calls


def resize(t: Tensor, dimension: int, size: int) -> Tensor:
    """One more along the dimension if it is of this size. On a GPU a longer sequence may be an index out of range,
    after which the process could not use it any more: there one less."""
    if t.dim() <= dimension or t.size(dimension) != size:
        return t
    if dimension > 0 and t.device.type != "cpu":
        return t.narrow(dimension, 0, max(1, size - 1))
    return torch.cat((t, t.narrow(dimension, 0, 1)), dimension)
