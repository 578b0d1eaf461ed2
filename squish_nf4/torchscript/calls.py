"""The call of a model: made from a user's example inputs, copied for every run, and at other sizes."""

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
    """The positional and keyword arguments that a user's example inputs stand for, copied.

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
    """A value's type, as an error names it."""
    kind = type(value)
    if isinstance(value, Mapping):
        return f"a {kind.__name__} whose keys are no names"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], *, named: bool = True) -> Any:
    """Change every tensor in nested tuples, lists and mappings; if not ``named``, NamedTuples become tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change, named=named) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change, named=named) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if named and hasattr(value, "_fields") else tuple(items)
    return value


def has_named_tuples(value: Any) -> bool:
    """Whether there is a NamedTuple anywhere in nested tuples and lists."""
    return isinstance(value, tuple | list) and (hasattr(value, "_fields") or any(map(has_named_tuples, value)))


def copied(call: Call) -> Call:
    """A copy of a call, for one run: a model may write into its inputs."""
    copy: Call = map_tensors(call, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
    return copy


def run(module: Any, call: Call) -> Any:
    """What the module returns for a copy of the call."""
    args, kwargs = copied(call)
    return module(*args, **kwargs)


def resized_calls(model: nn.Module, example: Call) -> dict[int, tuple[Call, Leaves]]:
    """{dimension: the example with another size of it, and eager's results}, for 0 and 1, where eager takes it.

    For a trace: one that has a size written into it is right at that size only.
    """
    calls: dict[int, tuple[Call, Leaves]] = {}
    for dimension in (0, 1):
        sizes = [t.size(dimension) for _, t in leaves(example) if isinstance(t, Tensor) and t.dim() > dimension]
        if not sizes or sizes[0] == 0:
            continue
        call = map_tensors(example, partial(resize, dimension=dimension, size=sizes[0]))
        try:
            calls[dimension] = call, results(run(model, call))
        except Exception:  # the model has this size in it: so may the trace
            continue
    return calls


def resize(t: Tensor, dimension: int, size: int) -> Tensor:
    """Make a tensor one longer along the dimension, if it is of this size there.

    On a GPU one shorter: a longer sequence may be an index out of range, which the process would not survive.
    """
    if t.dim() <= dimension or t.size(dimension) != size:
        return t
    if dimension > 0 and t.device.type != "cpu":
        return t.narrow(dimension, 0, max(1, size - 1))
    return torch.cat((t, t.narrow(dimension, 0, 1)), dimension)
