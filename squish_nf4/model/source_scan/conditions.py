"""Whether a condition in the source of a method holds, for one module: some branches no call of it ever takes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Container
from typing import Any

from torch import Tensor, nn

UNKNOWN = object()
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt},
    **{ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not},
    **{ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b},
}


def truth(node: ast.expr, this: str, module: nn.Module, changing: Container[str] = ()) -> bool | None:
    """Whether a condition holds for this module; None if that is not to be seen from its attributes.

    changing: names of attributes that may have another value later.
    """
    if isinstance(node, ast.BoolOp):
        found = [truth(value, this, module, changing) for value in node.values]
        decisive = isinstance(node.op, ast.Or)
        return decisive if decisive in found else None if None in found else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand, this, module, changing)
        return None if inner is None else not inner
    try:
        value = _value(node, this, module, changing)
        return None if value is UNKNOWN or isinstance(value, (Tensor, nn.Module)) else bool(value)
    except Exception:  # what an object of the model answers to a comparison is its own affair
        return None


def _value(node: ast.expr, this: str, module: nn.Module, changing: Container[str]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == this:
        return module
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, this, module, changing)
        if owner is UNKNOWN or isinstance(owner, Tensor) or node.attr == "training" or node.attr in changing:
            return UNKNOWN
        if isinstance(owner, nn.Module):
            held = {**owner._parameters, **owner._buffers, **owner._modules, **vars(owner)}
            return held.get(node.attr, UNKNOWN)
        return getattr(owner, node.attr, UNKNOWN)
    if isinstance(node, ast.Compare):
        values = [_value(each, this, module, changing) for each in (node.left, *node.comparators)]
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        pairs = zip(values, values[1:], node.ops, strict=False)
        return all(COMPARISONS[type(op)](left, right) for left, right, op in pairs)
    return UNKNOWN
