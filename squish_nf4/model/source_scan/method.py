"""What one method does with weights that are not its own, and under which conditions."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from squish_nf4.model.source_scan.values import DTYPE, MODULE, SHAPE, WEIGHT, Function, Names, Steps, Value, number

Condition = tuple[ast.expr, bool]  # an expression, and what it has to be for a line to run
# What is right of packed bytes as well; their numel() is not, but it counts a model's parameters and no more.
HARMLESS = {
    WEIGHT: (
        *("device", "is_meta", "is_cuda", "layout", "ndim", "dim", "requires_grad", "requires_grad_", "grad"),
        *("data_ptr", "is_floating_point", "numel"),
    ),
    DTYPE: ("is_floating_point",),
    SHAPE: (),
}
ASKS = ("isinstance", "hasattr", "is_tensor", "len")
CASTS = ("to", "type_as")


@dataclass(frozen=True)
class Read:
    """A line that takes packed bytes for numbers.

    Attributes:
        steps: from the module whose method it is to the layer.
        first: the line takes the first parameter below that module, whosever it is.
        place: file and line.
        this: what the method calls ``self``.
        conditions: under which it runs.
    """

    steps: Steps
    first: bool
    place: str
    this: str
    conditions: tuple[Condition, ...]


class MethodReads:
    """Collects the reads of one method.

    Each expression that may be a weight, a dtype or a shape is asked what is done with it. If that gives another one of
    them, or a name, the answer is found where that leads to; if it is right for packed bytes, it is no read.

    Attributes:
        reads: those of layers that are reached from ``self``.
        lost: the lines that read the weight of what nobody can follow.
    """

    def __init__(self, function: Function, this: str | None, file: str, line_before: int) -> None:
        self.this, self.file, self.line_before = this or "", file, line_before
        self.parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        self.names = Names(function, this)
        self.reads: list[Read] = []
        self.lost: list[str] = []
        self._block(function.body if isinstance(function.body, list) else [function.body], ())

    def _block(self, statements: list[Any], conditions: tuple[Condition, ...]) -> None:
        """Visits statements; those after ``if a: return`` run only if not a."""
        for statement in statements:
            self._visit(statement, conditions)
            if isinstance(statement, ast.If):
                if _ends(statement.body):
                    conditions = (*conditions, (statement.test, False))
                elif _ends(statement.orelse):
                    conditions = (*conditions, (statement.test, True))

    def _visit(self, node: ast.AST, conditions: tuple[Condition, ...]) -> None:
        if isinstance(node, ast.expr):
            self._record(node, conditions)
        if isinstance(node, (ast.If, ast.IfExp)):
            self._visit(node.test, conditions)
            for part, wanted in ((node.body, True), (node.orelse, False)):
                inside = (*conditions, (node.test, wanted))
                self._block(part, inside) if isinstance(part, list) else self._visit(part, inside)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                self._visit(value, conditions)
                conditions = (*conditions, (value, isinstance(node.op, ast.And)))
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            for loop in node.generators:
                self._visit(loop, conditions)
                conditions += tuple((test, True) for test in loop.ifs)
            for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
                self._visit(part, conditions)
        else:
            for _, value in ast.iter_fields(node):
                if isinstance(value, list):
                    self._block([each for each in value if isinstance(each, ast.AST)], conditions)
                elif isinstance(value, ast.AST):
                    self._visit(value, conditions)

    def _record(self, node: ast.expr, conditions: tuple[Condition, ...]) -> None:
        place = f"{self.file}:{self.line_before + node.lineno}"
        is_weight = isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
        if is_weight and isinstance(node, ast.Attribute) and not self.names.values(node.value):
            self.lost.append(place)
        for value in self._followed(node):
            if not self._is_harmless(node, value, conditions):
                self.reads.append(Read(value.steps, value.first, place, self.this, conditions))

    def _followed(self, node: ast.AST | None) -> list[Value]:
        """The weights, dtypes and shapes that an expression may be."""
        return sorted((v for v in self.names.values(node) if v.kind != MODULE), key=lambda value: value.steps)

    # --- what does no harm ---

    def _is_harmless(self, node: ast.expr, value: Value, conditions: tuple[Condition, ...]) -> bool:
        """Whether what is done with a value is right for packed bytes, or is looked at where it leads to."""
        user = self.parents[node]
        if isinstance(user, (ast.Expr, ast.FormattedValue)) or self._is_bound_by(user, node, value):
            return True
        if self._followed(user) and not (isinstance(user, ast.IfExp) and node is user.test):
            return True  # it is still followed, as what the whole expression is
        called = _called(user) if isinstance(user, ast.Call) and node in user.args else ""
        if value.first and value.kind == WEIGHT:
            # It may be any parameter: of what is done with such a one, only casts to its dtype do not fit bytes.
            return called not in CASTS and not (isinstance(user, ast.Attribute) and user.attr.startswith("new"))
        if isinstance(user, ast.Attribute):
            asked = user.attr == "size" and isinstance(self.parents[user], ast.Call)
            return user.attr in HARMLESS[value.kind] or (asked and _asks_for_rows(self.parents[user]))
        if called in ASKS:
            return True
        if isinstance(user, ast.Compare) and value.kind == WEIGHT:
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in user.ops)
        if value.kind == SHAPE:
            return isinstance(user, ast.Subscript) and user.value is node and _is_rows(user.slice)
        return value.kind == DTYPE and self._knows_bytes(node, conditions)

    def _is_bound_by(self, user: ast.AST, node: ast.expr, value: Value) -> bool:
        """Whether a statement only gives it a name."""
        if isinstance(user, (ast.For, ast.AsyncFor, ast.comprehension)):
            return bool(value.inside) and user.iter is node
        if isinstance(user, (ast.AnnAssign, ast.NamedExpr)):
            return isinstance(user.target, ast.Name)
        return isinstance(user, ast.Assign) and all(_only_names(target, value) for target in user.targets)

    def _knows_bytes(self, node: ast.AST, conditions: tuple[Condition, ...]) -> bool:
        """Whether a dtype stands beside or behind a question whether it is a floating one, or torch.uint8."""
        if any(self.names.asks_for_bytes(test) for test, _ in conditions):
            return True
        while isinstance(node := self.parents[node], (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            if self.names.asks_for_bytes(node):
                return True
        return False


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _only_names(target: ast.expr, value: Value) -> bool:
    """Whether a target gives the value a name; of an unpacked shape, the number of rows alone may get one."""
    if isinstance(target, ast.Name):
        return True
    if not isinstance(target, (ast.Tuple, ast.List)):
        return False
    if value.kind == SHAPE and not value.inside:
        return all(isinstance(one, ast.Name) and one.id == "_" for one in target.elts[1:])
    return bool(value.inside)


def _is_rows(asked: ast.expr) -> bool:
    """Whether this item of a shape is the number of rows, which packed bytes have too."""
    if isinstance(asked, ast.Slice):
        return asked.lower is None and asked.upper is not None and number(asked.upper) in (1, -1)
    return number(asked) in (0, -2)


def _asks_for_rows(call: ast.AST) -> bool:
    asked = [*call.args, *(word.value for word in call.keywords)] if isinstance(call, ast.Call) else []
    return all(_is_rows(one) for one in asked)


def _ends(statements: list[ast.stmt]) -> bool:
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))
