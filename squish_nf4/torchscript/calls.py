"""A model's call with example inputs: made from what a user gives, copied for every run, and at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from squish_nf4.torchscript.trial_program import Leaves, leaves, results

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def as_call(example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Call:
    """
    Raises:
        TypeError: they are something else, or hold something that is no input of TorchScript.
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        call: Call = (), dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        call = (example_inputs,), {}
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str | bytes):
        call = tuple(example_inputs), {}
    else:
        raise TypeError(
            "export_torchscript: example_inputs must be a tensor, a tuple or list of positional arguments, or a "
            f"mapping of keyword arguments, got {type_name(example_inputs)}"
        )
    for place, value in leaves(call[1] or call[0]):
        if not isinstance(value, Tensor) and type(value) not in PLAIN:  # a float of numpy is a float, but not plain
            raise TypeError(
                f"export_torchscript: example_inputs{place} must be a tensor, a number, a string, None, a torch.dtype "
                f"or a torch.device, or a tuple, list or mapping of these, got {type_name(value)}"
            )
    return copied(call)


def type_name(value: Any) -> str:
    kind = type(value)
    if isinstance(value, Mapping):
        return f"a {kind.__name__} whose keys are no names"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def with_tensors(value: Any, change: Callable[[Tensor], Tensor], *, named: bool = True) -> Any:
    """Nested tuples, lists and mappings with every tensor changed; if not ``named``, NamedTuples become tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_tensors(item, change, named=named) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [with_tensors(item, change, named=named) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if named and hasattr(value, "_fields") else tuple(items)
    return value


def has_named_tuples(value: Any) -> bool:
    """Anywhere in nested tuples and lists."""
    return isinstance(value, tuple | list) and (hasattr(value, "_fields") or any(map(has_named_tuples, value)))


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
            calls[dimension] = call, results(run(model, call))
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
