"""Runs an operator library in the Python and torch at hand and prints what it found, as JSON. Imports torch alone.

python check.py NAMESPACE LIBRARY CASES, where CASES is a list of (operator, arguments, result) that torch.save wrote.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def main(namespace: str, library: str, cases: str) -> dict[str, str]:
    found = {"": f"torch {torch.__version__}, Python {platform.python_version()}"}
    try:
        torch.ops.load_library(library)
    except OSError as error:
        cause = str(error.__cause__ or error).rpartition(": ")[2]
        return found | {"loads": f"no: {cause[:30]}..."}
    ops = getattr(torch.ops, namespace)
    found["results equal"] = count_equal(ops, cases)
    for name, question in QUESTIONS.items():
        torch.compiler.reset()
        found[name] = answer(question, ops)
    return found


def count_equal(ops: Any, path: str) -> str:
    cases = torch.load(path)
    good = 0
    for name, args, expected in cases:
        results = getattr(ops, name)(*args)
        pairs = [(results, expected)] if isinstance(expected, Tensor) else zip(results, expected, strict=True)
        good += all(result.dtype == wanted.dtype and torch.equal(result, wanted) for result, wanted in pairs)
    return f"{good} of {len(cases)}"


def answer(question: Callable[[Any], Any], ops: Any) -> str:
    """What a question returns, or the type of what it raises."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(question(ops))
    except Exception as error:
        return type(error).__name__


class Layer(torch.nn.Module):
    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.namespace = ops.name
        packed, scales = ops.quantize_nf4(torch.randn(64, 64), 32)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        linear = getattr(torch.ops, self.namespace).linear_nf4
        return linear(x, self.packed, self.scales, None, 32)


def opcheck(ops: Any) -> str:
    layer, w = Layer(ops), torch.randn(64, 64)
    packed, scales = layer.packed, layer.scales
    for op, args in (
        (ops.quantize_nf4, (w, 32)),
        (ops.dequantize_nf4, (packed, scales, 32)),
        (ops.linear_nf4, (torch.randn(3, 64), packed, scales, None, 32)),
    ):
        torch.library.opcheck(op.default, args)
    return "passes"


def compiled_graphs(ops: Any) -> int:
    """How often torch.compile compiles for five sizes of batch; two is the ideal: one fixed, one for every size."""
    count = 0

    def count_graph(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(Layer(ops), backend=count_graph, fullgraph=True)
    for rows in (2, 3, 5, 7, 9):
        compiled(torch.randn(rows, 64))
    return count


def export_dynamic(ops: Any) -> str:
    batch = {"x": {0: torch.export.Dim("batch", max=1024)}}
    program = torch.export.export(Layer(ops), (torch.randn(3, 64),), dynamic_shapes=batch)
    return f"works: {tuple(program.module()(torch.randn(5, 64)).shape)}"


def gradient(ops: Any) -> str:
    x = torch.randn(2, 64, requires_grad=True)
    Layer(ops)(x).sum().backward()
    return "none" if x.grad is None else "there"


def autocast(ops: Any) -> str:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(Layer(ops)(torch.randn(2, 64)).dtype)


def torchscript(ops: Any) -> str:
    layer, x = Layer(ops), torch.randn(2, 64)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.jit.save(torch.jit.trace(layer, x), file.name)
        return "equal" if torch.equal(torch.jit.load(file.name)(x), layer(x)) else "differs"


def vmap(ops: Any) -> str:
    layer, x = Layer(ops), torch.randn(3, 2, 64)
    return "equal" if torch.equal(torch.vmap(layer)(x), torch.stack([layer(row) for row in x])) else "differs"


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "wrong shape raises": lambda ops: ops.quantize_nf4(torch.randn(64), 32),
    "wrong dtype raises": lambda ops: ops.quantize_nf4(torch.ones(64, 64, dtype=torch.int32), 32),
    "wrong device raises": lambda ops: ops.linear_nf4(
        torch.randn(2, 64, device="meta"), Layer(ops).packed, Layer(ops).scales
    ),
    "opcheck": opcheck,
    "torch.compile, graphs for 5 batch sizes": compiled_graphs,
    "torch.export, dynamic batch": export_dynamic,
    "gradient of x": gradient,
    "dtype of linear under autocast bfloat16": autocast,
    "TorchScript, saved and loaded": torchscript,
    "vmap": vmap,
}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
