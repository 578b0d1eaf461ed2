"""Who reads the weight of a layer instead of calling the layer: found in the source of the modules that hold it.

``F.linear(x, self.proj.weight)`` would compute with packed bytes. Running a model does not find all of it: some code
runs only on a GPU, or only in training. So the methods of each class are parsed, and every path from ``self`` to a
``.weight`` is followed on the module itself. A branch that this module does not take, by its settings, does not count.
A function outside the class that is handed a layer is not seen.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from types import CodeType, FunctionType

from torch import Tensor, nn

from squish_nf4.model.source_scan.conditions import truth
from squish_nf4.model.source_scan.method import MethodReads, Read, Steps

# Methods that make, load, tie or change a model: they compute no activations, or say themselves what they need.
OTHER_WORK = (
    *("__init__", "__repr__", "__getstate__", "__setstate__", "__deepcopy__", "extra_repr", "state_dict", "register"),
    *("init", "_init", "initialize", "reset", "_reset", "tie", "_tie", "untie", "prune", "_prune", "load", "_load"),
    *("save", "_save", "from_", "set_", "resize", "_resize", "_get_resized", "merge", "unmerge", "fuse"),
)


def weight_readers(model: nn.Module) -> tuple[dict[int, str], list[str]]:
    """For each weight that a module other than its own reads: {id of the weight: a sentence that says who and where}.

    The second value names the methods that may read weights and whose source is not to be had.
    """
    readers: dict[int, str] = {}
    of_class: dict[type, list[Read]] = {}
    unseen: dict[str, None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in of_class:
            of_class[kind], without_source = _reads_of_class(kind)
            unseen |= dict.fromkeys(without_source)
        for read in of_class[kind]:
            if any(truth(test, read.this, module) is (not wanted) for test, wanted in read.conditions):
                continue
            for target in _follow(module, read.steps):
                weight = next(target.parameters(), None) if read.first else _weight_of(target)
                if weight is not None and (target is not module or read.first):
                    readers.setdefault(id(weight), f"{kind.__name__} reads its weight itself ({read.place})")
    return readers, list(unseen)


def _weight_of(module: nn.Module) -> Tensor | None:
    """What ``module.weight`` is; an adapter may answer with the weight of the layer that it wraps."""
    weight: object = module._parameters.get("weight")
    if weight is None and isinstance(inspect.getattr_static(module, "weight", None), property):
        with suppress(Exception):  # the property is the model's own code
            weight = module.weight
    return weight if isinstance(weight, Tensor) else None


def _follow(module: nn.Module, steps: Steps) -> Iterator[nn.Module]:
    if not steps:
        yield module
        return
    step, rest = steps[0], steps[1:]
    held = module._modules.values() if step is None else (module._modules.get(step) or vars(module).get(step),)
    for child in held:
        if isinstance(child, nn.Module):
            yield from _follow(child, rest)


def _reads_of_class(kind: type) -> tuple[list[Read], list[str]]:
    """What the methods of a class and its bases read, and the names of those without a source."""
    reads: list[Read] = []
    without_source: list[str] = []
    for function in _methods(kind):
        found = _reads_of_function(function)
        if found is None:
            without_source.append(f"{kind.__name__}.{function.__name__}")
        else:
            reads += found
    return reads, without_source


@lru_cache(maxsize=4096)
def _reads_of_function(function: FunctionType) -> tuple[Read, ...] | None:
    """What a method reads; None if it may read something and has no source."""
    code = function.__code__
    names = {*_names_in(code)}
    if "weight" not in names and not {"next", "parameters"} <= names:
        return ()
    try:
        lines, first_line = inspect.getsourcelines(function)
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, TokenError):  # none, or another one than was imported
        return None
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)) or not definition.args.args:
        return ()  # a lambda in a class, or a static method
    return tuple(MethodReads(definition, Path(code.co_filename).name, first_line, "uint8" in names).reads)


def _methods(kind: type) -> Iterator[FunctionType]:
    """The functions that can run on an instance: an overridden one only if the overriding one calls super()."""
    hidden: set[str] = set()
    for base in kind.__mro__:
        if base is object or base.__module__.startswith("torch.nn."):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "fget", getattr(value, "__func__", value))  # of a property, of a class method
            function = inspect.unwrap(value) if callable(value) else value
            if not isinstance(function, FunctionType) or name in hidden:
                continue
            if "super" not in function.__code__.co_names:
                hidden.add(name)
            if name != "weight" and not name.startswith(OTHER_WORK):  # a property of that name only hands it on
                yield function


def _names_in(code: CodeType) -> Iterator[str]:
    """The names and strings in a function, and in its comprehensions, lambdas and inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif inspect.iscode(constant):
            yield from _names_in(constant)
