"""What torch.utils.flop_counter counts for a product with packed weights: as much as for one with dense weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Called once, when the package is imported. The counter imports triton, which takes a second: it is waited for."""
    if COUNTER in sys.modules:
        _register_formulas(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """Asked for every module that is imported; registers the formulas when the counter is, and leaves."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_formulas(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_formulas(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.squish.linear_nf4)(_linear)
    counter.register_flop_formula(torch.ops.squish._linear_nf4_grad_x)(_linear_grad_x)


def _linear(x: Sequence[int], packed: Sequence[int], *others: Any, **named: Any) -> int:
    """Shapes in, operations out: 2 M N K."""
    return 2 * prod(x) * packed[0]


def _linear_grad_x(
    dy: Sequence[int], packed: Sequence[int], scales: Sequence[int], group_size: int, d: int, **named: Any
) -> int:
    return 2 * prod(dy) * d
