"""Who reads the weight of a layer instead of calling the layer: found in the source of the modules that hold it.

``F.linear(x, self.proj.weight)`` would compute with packed bytes. Running a model does not find all of it: some code
runs only on a GPU, or only in training. So the methods of each class are parsed, and what they do with weights is
followed on the module itself. A branch that this module does not take, by its settings, does not count. What cannot be
followed is noted. A function outside the class that is handed a layer is not seen.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from squish_nf4.model.source_scan.class_source import (
    Method,
    first_argument,
    functions_of,
    methods,
    names_in,
    set_later,
    tree_of,
)
from squish_nf4.model.source_scan.conditions import truth
from squish_nf4.model.source_scan.method import MethodReads, Read
from squish_nf4.model.source_scan.values import BELOW, CHILD, Steps

NAMES = ("weight", "parameters", "named_parameters")  # a function without one of them reads no weight


@dataclass
class Readers:
    """Who reads weights.

    Attributes:
        of: for each module whose weight another one reads, {its id: a sentence that says who and where}.
        notes: a sentence for each method that may read weights and cannot be followed.
    """

    of: dict[int, str] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


def weight_readers(model: nn.Module) -> Readers:
    readers = Readers()
    of_class: dict[type, list[Read]] = {}
    holders = _holders(model)
    for module in model.modules():
        kind: Any = type(module)
        if kind not in of_class:
            of_class[kind] = list(_reads(methods(kind), kind.__name__, readers.notes))
        for read in [*of_class[kind], *_reads(_own_methods(module), kind.__name__, readers.notes)]:
            changing = set_later(kind) if read.conditions else ()
            if any(truth(test, read.this, module, changing) is (not wanted) for test, wanted in read.conditions):
                continue
            for target in _follow(module, read.steps):
                if target is module and not read.first:
                    continue  # its own weight
                for holder in _holders_of(target, read.first, holders):
                    readers.of.setdefault(id(holder), f"{kind.__name__} reads its weight itself ({read.place})")
    return readers


def class_that_names(model: nn.Module, setting: str) -> str | None:
    """The first class of a model that has a method, such as forward, in which a setting is read."""
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if any(setting in names_in(method.function.__code__) for method in methods(kind)):
            return kind.__name__
    return None


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold a parameter themselves, by its id."""
    holders: defaultdict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(module)
    return holders


def _holders_of(target: nn.Module, first: bool, holders: dict[int, list[nn.Module]]) -> Iterable[nn.Module]:
    """The module whose weight is read; an adapter may answer with the weight of the layer that it wraps."""
    if first:  # one that is tied to it, and is not reached so, may be parted from it
        return [module for module in target.modules() if next(module.parameters(recurse=False), None) is not None][:1]
    if target._parameters.get("weight") is not None:
        return [target]
    weight = _attribute(target, "weight")
    return holders.get(id(weight), ()) if isinstance(weight, Tensor) else ()


def _attribute(owner: Any, name: str) -> Any:
    """An attribute, a property or, of ``name()``, what a method returns; it is the model's own code, and may fail."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        return getattr(owner, name.removesuffix("()"))() if name.endswith("()") else getattr(owner, name)
    return None


def _follow(owner: Any, steps: Steps) -> Iterator[nn.Module]:
    """The modules to which steps lead, also through lists and dictionaries that are no modules."""
    if not steps:
        if isinstance(owner, nn.Module):
            yield owner
        return
    for held in _held(owner, steps[0]):
        yield from _follow(held, steps[1:])


def _held(owner: Any, step: str) -> Iterable[Any]:
    if isinstance(owner, dict):
        return owner.values() if step in (CHILD, BELOW) else [owner.get(step)]
    if isinstance(owner, (list, tuple)):
        return owner if step in (CHILD, BELOW) or not step.isdigit() else owner[int(step) : int(step) + 1]
    if not isinstance(owner, nn.Module):
        return ()
    if step == BELOW:
        return owner.modules()
    if step == CHILD:
        return [child for child in owner._modules.values() if child is not None]
    found = owner._modules.get(step)
    return [_attribute(owner, step) if found is None else found]


# --- what is read in functions ----------------------------------------------------------------------------------------


def _own_methods(module: nn.Module) -> Iterator[Method]:
    """The functions that somebody has put on this very instance, such as another forward."""
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            yield from functions_of(value.__func__)
        elif name == "forward":
            yield from (Method(method.function, bound=False) for method in functions_of(value))


def _reads(found: Iterable[Method], owner: str, notes: dict[str, None]) -> Iterator[Read]:
    lost: list[str] = []
    for method in found:
        result = _reads_of(method)
        if result is None:
            name = f"{owner}.{method.function.__name__}"
            notes[f"{name} may read weights itself, and its source is not to be had"] = None
        else:
            yield from result.reads
            lost += result.lost
    if lost:
        more = f" and {len(lost) - 1} more lines" if len(lost) > 1 else ""
        notes[f"{owner} reads a weight that cannot be followed ({lost[0]}{more})"] = None


@dataclass(frozen=True)
class _Result:
    reads: tuple[Read, ...] = ()
    lost: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def _reads_of(method: Method) -> _Result | None:
    """What a method reads; None if it may read something and has no source."""
    code = method.function.__code__
    if not any(name in NAMES or name.endswith(".weight") for name in names_in(code)):
        return _Result()
    parsed = tree_of(method.function)
    if parsed is None:
        return None
    tree, line_before = parsed
    found = MethodReads(tree, first_argument(tree) if method.bound else None, Path(code.co_filename).name, line_before)
    return _Result(tuple(found.reads), tuple(dict.fromkeys(found.lost)))
