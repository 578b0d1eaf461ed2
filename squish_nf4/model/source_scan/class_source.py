"""Which functions can run on an instance of a class, and what their source is."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from tokenize import TokenError
from types import CodeType, FunctionType
from typing import Any

from squish_nf4.model.source_scan.values import Function

# Methods that build, load, save, tie or change a model, by their whole name: they compute no activations, or say
# themselves what they need.
OTHER_WORK = re.compile(
    r"__(init|repr|getstate|setstate|deepcopy)__|extra_repr|post_init|fuse|((from|save|load)_pretrained)"
    r"|_?(init|initialize)(_\w+)?_weights|_?reset(_\w+)?_parameters|_?tie_(weights|embeddings\w*)|_?prune_(heads|layer)"
    r"|_?(get_)?resized?_(\w+_)?(embeddings|lm_head|qa_labels)|set_(input|output)_embeddings|(un)?merge(_(un)?safe)?"
    r"|(_?load_(from_)?|_?save_to_|)state_dict"
)


@dataclass(frozen=True)
class Method:
    """A function that may run on an instance.

    Attributes:
        function: without what is around it: a property, a decorator.
        bound: whether its first argument is the instance.
    """

    function: FunctionType
    bound: bool = True


def methods(kind: type) -> list[Method]:
    """The functions that can compute something on an instance; of an adapter of PEFT, those that its forward reaches.

    What else an adapter has builds it and merges it, and reads the weight below for that.
    """
    found = list(_methods(kind))
    if not kind.__module__.startswith("peft."):
        return [method for _, method in found]
    reached, names = [], {"forward"}
    while found and (more := [each for each in found if each[0] in names]):
        reached += [method for _, method in more]
        names = {named for _, method in more for named in names_in(method.function.__code__)}
        found = [each for each in found if each not in more]
    return reached


def _methods(kind: type) -> Iterator[tuple[str, Method]]:
    """The functions of a class and its bases, by name; an overridden one only if the overriding one calls it."""
    overriding: dict[str, set[str]] = {}  # the names in the last function of this name; with super(), of those before
    for base in kind.__mro__:
        if not _computes(base):
            continue
        for name, value in vars(base).items():
            if name == "weight" or OTHER_WORK.fullmatch(name):  # a property of that name only hands it on
                continue
            found = list(functions_of(value))
            if name in overriding and not overriding[name] & {"super", base.__name__}:
                continue
            if found:
                overriding[name] = {named for method in found for named in names_in(method.function.__code__)}
            yield from ((name, method) for method in found)


def _computes(base: type) -> bool:
    """Whether methods of this class may take bytes for numbers.

    Those of nn.Module and PreTrainedModel hold, load and resize; those of this package know what they read.
    """
    others = ("torch.nn.", "transformers.modeling_utils", "squish_nf4.")
    return base is not object and not base.__module__.startswith(others)


def functions_of(value: Any) -> Iterator[Method]:
    """The functions that run if an attribute of a class is used; of a decorated one also what the decorator holds."""
    bound = not isinstance(value, (staticmethod, classmethod))
    for inner in ("fget", "__func__", "func"):  # of a property, a class method, a cached property or partial method
        value = getattr(value, inner, value)
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, FunctionType):
        yield Method(value, bound)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                if isinstance(cell.cell_contents, FunctionType):
                    yield Method(cell.cell_contents, bound)


def tree_of(function: FunctionType) -> tuple[Function, int] | None:
    """The syntax tree of a function and the number of the line before its first; None without a source."""
    try:
        lines, first_line = inspect.getsourcelines(function)
        indented = lines[0][:1].isspace()  # by less than a comment in it may be
        tree = ast.parse("".join(["if True:\n"] * indented + lines))
    except (OSError, TypeError, SyntaxError, IndexError, TokenError):  # none, or another one than was imported
        return None
    wanted = ast.Lambda if function.__name__ == "<lambda>" else (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, wanted)]
    if not found or (wanted is ast.Lambda and len(found) > 1):
        return None
    return found[0], first_line - 1 - indented


def first_argument(function: Function) -> str | None:
    arguments = [*function.args.posonlyargs, *function.args.args]
    return arguments[0].arg if arguments else None


@functools.lru_cache(maxsize=4096)
def set_later(kind: type) -> frozenset[str]:
    """The attributes that a method of a class sets after __init__, on whatever object: they are no settings."""
    return frozenset(
        step.argval
        for base in kind.__mro__
        if _computes(base)
        for name, value in vars(base).items()
        if name != "__init__"
        for method in functions_of(value)
        for step in dis.get_instructions(method.function)
        if step.opname == "STORE_ATTR"
    )


def names_in(code: CodeType) -> Iterator[str]:
    """The names and strings in a function, and in its comprehensions, lambdas and inner functions."""
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (item for item in constant if isinstance(item, str))
        elif inspect.iscode(constant):
            yield from names_in(constant)
