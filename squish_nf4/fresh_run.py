"""The program of the fresh process in which an exported file is tried: torch and the op library, nothing of squish_nf4.

Started by fresh_process.py as ``python -c``; a C++ program does the same four things.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of nested tuples, lists and mappings, each with its place: ("['logits'][0]", t)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value.detach().cpu() if isinstance(value, Tensor) else value


def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]] | str:
    """The leaves of the result, or the last line of the error."""
    try:
        return list(leaves(module(*args, **kwargs)))
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[-1]


def main(library: str, file: str, tasks: str, results: str) -> None:
    task = torch.load(tasks, weights_only=True)
    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision(task["precision"])
    torch.set_grad_enabled(task["grad"])
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    outputs = [call(module, args, kwargs) for args, kwargs in task["calls"]]
    assert "squish_nf4" not in sys.modules, "the op library has to be enough"
    operators = [name for name in torch.jit.export_opnames(module) if name.startswith("squish::")]  # type: ignore[no-untyped-call]
    torch.save({"operators": operators, "outputs": outputs}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
