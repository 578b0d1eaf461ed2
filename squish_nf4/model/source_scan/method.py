"""What one method reads: every path from ``self`` to the ``.weight`` of another module, and under which conditions."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Condition = tuple[ast.expr, bool]  # an expression, and what it has to be for a line to run
Steps = tuple["str | None", ...]  # attributes and items that lead from a module to another one; None: any child
HARMLESS = ("device", "is_meta", "is_cuda", "layout", "ndim", "dim", "requires_grad", "requires_grad_", "grad")


@dataclass(frozen=True)
class Read:
    """A line that reads a weight.

    Attributes:
        steps: from the module whose method it is to the layer.
        first: the line reads the first parameter below that module, whosever it is.
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
    """Collects the reads of one method."""

    def __init__(self, method: ast.FunctionDef | ast.AsyncFunctionDef, file: str, line: int, knows_bytes: bool) -> None:
        self.this = method.args.args[0].arg
        self.file, self.line, self.knows_bytes = file, line, knows_bytes
        self.parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        self.locals: dict[str, set[Steps]] = defaultdict(set)
        for _ in range(2):  # a name may be bound further down than it is used, in a loop
            self._bind(ast.walk(method))
        self.reads: list[Read] = []
        self._block(method.body, ())

    # --- which modules an expression may be ---

    def _modules(self, node: ast.AST | None) -> set[Steps]:
        if isinstance(node, ast.Name):
            return {(), *self.locals[node.id]} if node.id == self.this else self.locals[node.id]
        if isinstance(node, ast.Attribute):
            return {(*steps, node.attr) for steps in self._modules(node.value)}
        if isinstance(node, ast.Subscript):
            key = node.slice
            if isinstance(key, ast.Slice):
                return self._modules(node.value)
            known = isinstance(key, ast.Constant) and not isinstance(key.value, bool)
            item = str(key.value) if known and isinstance(key, ast.Constant) else None
            return {(*steps, item) for steps in self._modules(node.value)}
        if isinstance(node, ast.IfExp):
            return self._modules(node.body) | self._modules(node.orelse)
        if isinstance(node, ast.BoolOp):
            return {steps for value in node.values for steps in self._modules(value)}
        if isinstance(node, ast.NamedExpr):
            return self._modules(node.value)
        if (name := _got_attribute(node)) is not None and isinstance(node, ast.Call):
            return {(*steps, name or None) for steps in self._modules(node.args[0])}
        return set()

    def _items(self, node: ast.expr) -> set[Steps]:
        """What a loop over the expression goes through."""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("children", "values"):
                return {(*steps, None) for steps in self._modules(node.func.value)}
            if isinstance(node.func, ast.Name) and node.func.id in ("reversed", "list", "tuple") and node.args:
                return self._items(node.args[0])
            return set()
        if isinstance(node, (ast.Tuple, ast.List)):
            return {steps for element in node.elts for steps in self._modules(element)}
        return {(*steps, None) for steps in self._modules(node)}

    def _bind(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind_to(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._bind_to(node.target, node.value)
            elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
                self._bind_loop(node.target, node.iter)

    def _bind_to(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.locals[target.id] |= self._modules(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its_value in zip(target.elts, value.elts, strict=True):
                self._bind_to(one, its_value)

    def _bind_loop(self, target: ast.expr, over: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.locals[target.id] |= self._items(over)
        elif isinstance(target, ast.Tuple) and isinstance(over, ast.Call):
            called = over.func.id if isinstance(over.func, ast.Name) else getattr(over.func, "attr", "")
            if called == "zip" and len(target.elts) == len(over.args):
                for one, its_items in zip(target.elts, over.args, strict=True):
                    self._bind_loop(one, its_items)
            elif called == "enumerate" and over.args:
                self._bind_loop(target.elts[-1], over.args[0])
            elif called in ("items", "named_children") and isinstance(over.func, ast.Attribute):
                last = target.elts[-1]
                if isinstance(last, ast.Name):
                    self.locals[last.id] |= {(*steps, None) for steps in self._modules(over.func.value)}

    # --- what it reads ---

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
        else:
            for _, value in ast.iter_fields(node):
                if isinstance(value, list):
                    self._block([each for each in value if isinstance(each, ast.AST)], conditions)
                elif isinstance(value, ast.AST):
                    self._visit(value, conditions)

    def _record(self, node: ast.AST, conditions: tuple[Condition, ...]) -> None:
        holder, first = None, False
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            holder = node.value
        elif _got_attribute(node) == "weight" and isinstance(node, ast.Call):
            holder = node.args[0]
        elif (of := _first_parameter_of(node)) is not None:
            holder, first = of, True
        modules = self._modules(holder)
        if modules and not self._is_harmless(node, first):
            place = f"{self.file}:{self.line + getattr(node, 'lineno', 1) - 1}"
            self.reads += [Read(steps, first, place, self.this, conditions) for steps in modules]

    def _is_harmless(self, node: ast.AST, first: bool) -> bool:
        """Whether what is done with a weight is right for packed bytes as well."""
        user = self.parents[node]
        if isinstance(user, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in user.ops)
        if isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id in ("isinstance", "hasattr"):
            return True
        if not isinstance(user, ast.Attribute):
            return first  # nobody knows which parameter that is, unless its dtype is taken at once
        if user.attr == "dtype":
            return self.knows_bytes or isinstance(self.parents[user], (ast.Compare, ast.FormattedValue))
        if user.attr in ("shape", "size"):
            return not self._asks_for_columns(user)
        return user.attr in HARMLESS or first

    def _asks_for_columns(self, shape: ast.Attribute) -> bool:
        """Whether a shape is asked for another number than that of the rows: packed bytes have fewer columns."""
        user = self.parents[shape]
        asked = user.slice if isinstance(user, ast.Subscript) else None
        if isinstance(user, ast.Call) and user.func is shape and user.args:
            asked = user.args[0]
        return asked is not None and not (isinstance(asked, ast.Constant) and asked.value == 0)


def _ends(statements: list[ast.stmt]) -> bool:
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _got_attribute(node: ast.AST | None) -> str | None:
    """The name that ``getattr(x, "name")`` asks for; "" if it is not written there, None if this is no getattr."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"):
        return None
    if len(node.args) < 2:
        return None
    name = node.args[1]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def _first_parameter_of(node: ast.AST) -> ast.expr | None:
    """x of ``next(x.parameters())``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next" and node.args:
        made = node.args[0]
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and made.func.attr == "parameters":
            return made.func.value
    return None
