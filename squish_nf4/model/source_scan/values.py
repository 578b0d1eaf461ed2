"""What an expression in a method may be: a module reached from ``self``, a weight of one, its dtype, its shape."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

MODULE, WEIGHT, DTYPE, SHAPE = "module", "weight", "dtype", "shape"
CHILD, BELOW = "*", "**"  # steps to any child, and to any module below

Steps = tuple[str, ...]  # attributes, items and calls without arguments ("get_base_layer()") from self to a module
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# Methods that give many modules: where they are, and in how many lists or tuples each of them lies.
MANY = {"children": (CHILD, 1), "values": (CHILD, 1), "named_children": (CHILD, 2), "items": (CHILD, 2)}
MANY |= {"modules": (BELOW, 1), "named_modules": (BELOW, 2)}
PARAMETERS = {"parameters": 1, "named_parameters": 2}
SAME_ITEMS = ("list", "tuple", "iter", "reversed", "sorted", "set")


@dataclass(frozen=True)
class Value:
    """One thing that an expression may be.

    Attributes:
        kind: MODULE, WEIGHT, DTYPE or SHAPE.
        steps: to the module, or to the one whose weight it is.
        first: the weight is the first parameter below that module, whosever it is.
        inside: the number of lists or tuples in which it lies.
    """

    kind: str
    steps: Steps
    first: bool = False
    inside: int = 0

    def step(self, *steps: str) -> Value:
        return replace(self, steps=(*self.steps, *steps))

    def attribute(self, name: str) -> Value | None:
        """What an attribute of it is."""
        if self.inside:
            return None
        if self.kind == MODULE:
            if name in ("_modules", "_parameters"):
                return self  # an item of these is what an attribute of the module is
            return replace(self, kind=WEIGHT) if name == "weight" else self.step(name)
        if self.kind == WEIGHT:
            return self if name == "data" else replace(self, kind=name) if name in (DTYPE, SHAPE) else None
        return None

    def item(self) -> Value | None:
        """What any item of it is."""
        if self.inside:
            return replace(self, inside=self.inside - 1)
        return self.step(CHILD) if self.kind == MODULE else None


class Names:
    """The names of a method and what they may stand for, whichever line has bound them."""

    def __init__(self, function: Function, this: str | None) -> None:
        self.bound: defaultdict[str, set[Value]] = defaultdict(set)
        if this is not None:
            self.bound[this].add(Value(MODULE, ()))
        for _ in range(3):  # a name may be bound further down than it is used, in a loop
            for node in ast.walk(function):
                self._bind_in(node)

    def values(self, node: ast.AST | None) -> set[Value]:
        """All that an expression may be; empty if nobody knows or it is something else."""
        if isinstance(node, ast.Name):
            return set(self.bound.get(node.id, ())) if isinstance(node.ctx, ast.Load) else set()
        if isinstance(node, ast.Attribute):
            found = [value.attribute(node.attr) for value in self.values(node.value)]
            return _known(found) if isinstance(node.ctx, ast.Load) else set()
        if isinstance(node, ast.Subscript):
            return _known(item for value in self.values(node.value) for item in _items_at(value, node.slice))
        if isinstance(node, ast.IfExp):
            return self._unless_asked(self.values(node.body) | self.values(node.orelse), [node.test])
        if isinstance(node, ast.BoolOp):
            return self._any(node.values)
        if isinstance(node, (ast.NamedExpr, ast.Starred, ast.Await)):
            return self.values(node.value)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return _within(self._any(node.elts))
        if isinstance(node, ast.Dict):
            return _within(self._any(node.values))
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            items = _within(self.values(node.elt))
            return self._unless_asked(items, [test for loop in node.generators for test in loop.ifs])
        if isinstance(node, ast.DictComp):
            return _within(self.values(node.value))
        return self._of_call(node) if isinstance(node, ast.Call) else set()

    def _any(self, nodes: Iterable[ast.expr]) -> set[Value]:
        return {value for node in nodes for value in self.values(node)}

    def asks_for_bytes(self, test: ast.AST) -> bool:
        """Whether it is asked there if the dtype of a weight is a floating one, or torch.uint8."""
        for node in ast.walk(test):
            if isinstance(node, ast.Attribute) and node.attr == "is_floating_point" and self.values(node.value):
                return True
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = {name.attr for side in sides for name in ast.walk(side) if isinstance(name, ast.Attribute)}
                if "uint8" in named and any(value.kind == DTYPE for value in self._any(sides)):
                    return True
        return False

    def _unless_asked(self, values: set[Value], tests: list[ast.expr]) -> set[Value]:
        """The values, without the dtypes that stand behind such a question: who asks it knows what to do with bytes."""
        asked = any(value.kind == DTYPE for value in values) and any(self.asks_for_bytes(test) for test in tests)
        return {value for value in values if value.kind != DTYPE} if asked else values

    def items(self, node: ast.AST) -> set[Value]:
        """What a loop over the expression goes through."""
        return _known(value.item() for value in self.values(node))

    def _of_call(self, call: ast.Call) -> set[Value]:
        if isinstance(call.func, ast.Name) and call.args:
            of = call.args[0]
            if call.func.id == "getattr" and len(call.args) > 1:
                return self._got(of, call.args[1])
            if call.func.id == "next":
                return self.items(of)
            if call.func.id in SAME_ITEMS:
                return _within(self.items(of))
            if call.func.id == "enumerate":
                return _within(self.items(of), 2)
        if isinstance(call.func, ast.Attribute):
            name, owners = call.func.attr, [value for value in self.values(call.func.value) if not value.inside]
            modules = [value for value in owners if value.kind == MODULE]
            if name == "size" and not call.args and not call.keywords:
                return {replace(value, kind=SHAPE) for value in owners if value.kind == WEIGHT}
            if name in MANY:
                step, depth = MANY[name]
                return _within({value.step(step) for value in modules}, depth)
            if name in PARAMETERS:
                first = {replace(value, kind=WEIGHT, first=True) for value in modules}
                return _within(first, PARAMETERS[name])
            if name in ("get_submodule", "get_parameter") and call.args and (path := _text(call.args[0])) is not None:
                *steps, last = path.split(".")
                return _known(value.step(*steps).attribute(last) for value in modules)
            if name.startswith("get_") and not call.args and not call.keywords:
                return {value.step(f"{name}()") for value in modules}
        return set()

    def _got(self, of: ast.expr, name: ast.expr) -> set[Value]:
        """What ``getattr(of, name)`` is; the weight as well as any child, if the name is not written there."""
        text, owners = _text(name), self.values(of)
        if text is not None:
            return _known(value.attribute(text) for value in owners)
        modules = [value for value in owners if value.kind == MODULE]
        return _known(found for value in modules for found in (value.item(), value.attribute("weight")))

    # --- what binds a name ---

    def _bind_in(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind_to(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._bind_to(node.target, node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._bind_loop(node.target, node.iter)

    def _bind_to(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its_value in zip(target.elts, value.elts, strict=True):
                self._bind_to(one, its_value)
        else:
            self._bind(target, self.values(value))

    def _bind_loop(self, target: ast.expr, over: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(over, ast.Call) and isinstance(over.func, ast.Name):
            if over.func.id == "zip" and len(target.elts) == len(over.args):
                for one, its_items in zip(target.elts, over.args, strict=True):
                    self._bind_loop(one, its_items)
                return
            if over.func.id == "enumerate" and over.args:
                self._bind_loop(target.elts[-1], over.args[0])
                return
        self._bind(target, self.items(over))

    def _bind(self, target: ast.expr, values: set[Value]) -> None:
        if isinstance(target, ast.Name):
            self.bound[target.id] |= values
        elif isinstance(target, ast.Starred):
            self._bind(target.value, _within(values))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for value in values:
                for one in target.elts:
                    self._bind(one, _known([value.item()]))


def _items_at(value: Value, key: ast.expr) -> Iterator[Value | None]:
    """What ``value[key]`` is."""
    if value.inside:
        yield value if isinstance(key, ast.Slice) else value.item()
    elif value.kind == MODULE:
        if isinstance(key, ast.Slice):
            yield replace(value.step(CHILD), inside=1)
        elif (text := _text(key)) is not None:
            yield value.attribute(text)
        else:
            place = number(key)
            yield value.step(CHILD if place is None or place < 0 else str(place))


def number(node: ast.expr) -> int | None:
    """The whole number that is written there."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = number(node.operand)
        return None if inner is None else -inner
    whole = isinstance(node, ast.Constant) and type(node.value) is int
    return node.value if whole and isinstance(node, ast.Constant) and isinstance(node.value, int) else None


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _known(values: Iterable[Value | None]) -> set[Value]:
    return {value for value in values if value is not None}


def _within(values: set[Value], depth: int = 1) -> set[Value]:
    return {replace(value, inside=value.inside + depth) for value in values}
