"""What calls of a model may change in it: found by name, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from squish_nf4.torchscript.comparison import have_same_bits

MISSING = object()
REGISTRIES = ("_buffers", "_parameters", "_modules")  # of a module; no part of the names of what they hold


class ModelState:
    """A model's state at one moment: attributes of its modules, lists and dicts in them, and the values of tensors.

    Parameters may be large and are not copied: that one was written to is found out, and not undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers = [(name, found, items_of(found)) for name, found in containers_of(model)]
        tensors = {id(t): (name, t) for name, t in tensors_of(model, self._containers)}
        self._values = [(name, t, t.detach().clone()) for name, t in tensors.values()]
        self._versions = [(name, p, p._version) for name, p in model.named_parameters() if not p.is_inference()]

    def written(self) -> list[str]:
        """The tensors that hold other values now, by name."""
        return [name for name, tensor, value in self._values if not same_values(tensor, value)]

    def assigned(self) -> list[str]:
        """What was set to something else, or is new, by name."""
        return [f"{name}{key}" for name, found, before in self._containers for key in changed(items_of(found), before)]

    def parameters_written(self) -> list[str]:
        """The parameters that were written to since, by name."""
        return [name for name, parameter, version in self._versions if parameter._version != version]

    def restore(self) -> None:
        """Put everything back but the values of parameters."""
        for _, found, before in self._containers:
            if not changed(items_of(found), before):
                continue
            if isinstance(found, dict):
                found.clear()
                found.update(before)
            else:
                found[:] = before.values()
        for _, tensor, value in self._values:
            if not same_values(tensor, value):  # to write the same would still spoil a backward that is to come
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[ModelState]:
    """Keep the model's state, and put it back at the end."""
    state = ModelState(model)
    try:
        yield state
    finally:
        state.restore()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor still holds the values of its copy ``b``."""
    if a.layout != torch.strided or a.is_quantized:
        return True  # nobody writes into those
    return have_same_bits(a.detach(), b)


def items_of(found: Any) -> dict[Any, Any]:
    """A copy of a dict, or of a list by index."""
    return dict(found if isinstance(found, dict) else enumerate(found))


def changed(now: dict[Any, Any], before: dict[Any, Any]) -> list[Any]:
    """The keys under which there is another object now, a new one, or none any more."""
    return [key for key in {**before, **now} if now.get(key, MISSING) is not before.get(key, MISSING)]


def containers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of every module, and the lists and dicts in them, each with how the names of its items begin."""
    seen: set[int] = set()

    def walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict | list) or id(value) in seen:
            return
        seen.add(id(value))
        yield name, value
        for key, item in items_of(value).items():
            yield from walk(name if key in REGISTRIES else f"{name}{key}.", item)

    for name, module in model.named_modules():
        yield from walk(f"{name}." if name else "", vars(module))


def tensors_of(model: nn.Module, containers: list[tuple[str, Any, dict[Any, Any]]]) -> Iterator[tuple[str, Tensor]]:
    """The model's buffers, and other tensors in its containers that are no parameters, by name."""
    yield from model.named_buffers()  # of ScriptModules too, which hold them elsewhere
    for name, _, items in containers:
        for key, value in items.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                yield f"{name}{key}", value
