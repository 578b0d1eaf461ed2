"""Export and compile with sizes that are not known: the program traced once runs at other sizes, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import squish_nf4  # noqa: F401  (loads the operators)

OPS = torch.ops.squish


class Call(nn.Module):
    """A function as a module: torch.export takes nothing else."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def exported(function: Callable[..., Any], args: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> Callable[..., Any]:
    return export(Call(function), args, dynamic_shapes=(shapes,)).module()


def quantize(w: Tensor) -> Any:
    return OPS.quantize_nf4(w, 32)


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    return OPS.dequantize_nf4(packed, scales, 32, dtype=torch.bfloat16)


def linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    return OPS.linear_nf4(x, packed, scales, bias, 32)


def weight(n: int, d: int) -> tuple[Tensor, Tensor]:
    return OPS.quantize_nf4(torch.randn(n, d), 32)


def require_equal(found: Any, expected: Any) -> None:
    found, expected = ((value,) if isinstance(value, Tensor) else value for value in (found, expected))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BOTH = [pytest.param(Dim, id="named"), pytest.param(lambda name: Dim.AUTO, id="auto")]


@pytest.mark.parametrize("dim", BOTH)
def test_quantize_exports_with_dynamic_rows(dim: Callable[[str], Any]) -> None:
    program = exported(quantize, (torch.randn(10, 128),), ({0: dim("n")},))
    for n in (0, 1, 2, 10, 333):
        w = torch.randn(n, 128)
        require_equal(program(w), quantize(w))


def test_quantize_exports_with_dynamic_rows_and_columns() -> None:
    program = exported(quantize, (torch.randn(10, 128),), ({0: Dim("n"), 1: 64 * Dim("blocks")},))
    for n, d in [(1, 64), (10, 128), (333, 192), (5, 6400)]:
        w = torch.randn(n, d)
        require_equal(program(w), quantize(w))


@pytest.mark.parametrize("dim", BOTH)
def test_dequantize_exports_with_dynamic_rows(dim: Callable[[str], Any]) -> None:
    rows = dim("n")
    program = exported(dequantize, weight(10, 128), ({0: rows}, {0: rows}))
    for n in (0, 1, 2, 10, 333):
        packed, scales = weight(n, 128)
        require_equal(program(packed, scales), dequantize(packed, scales))


def test_dequantize_exports_with_dynamic_rows_and_columns() -> None:
    both = {0: Dim.AUTO, 1: Dim.AUTO}
    program = exported(dequantize, weight(10, 128), (both, both))
    for n, d in [(2, 64), (10, 128), (333, 192)]:
        packed, scales = weight(n, d)
        require_equal(program(packed, scales), dequantize(packed, scales))


@pytest.mark.parametrize("dim", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_exports_with_a_dynamic_batch(dim: Callable[[str], Any], dtype: torch.dtype) -> None:
    packed, scales = weight(10, 128)
    bias = torch.randn(10)
    args = (torch.randn(4, 5, 128, dtype=dtype), packed, scales, bias)
    program = exported(linear, args, ({0: dim("batch"), 1: dim("tokens")}, None, None, None))
    for batch, tokens in [(0, 3), (1, 1), (1, 8), (4, 5), (60, 5)]:  # fused sizes and tiled ones
        x = torch.randn(batch, tokens, 128, dtype=dtype)
        require_equal(program(x, packed, scales, bias), linear(x, packed, scales, bias))


def test_linear_exports_with_dynamic_rows_and_padding() -> None:
    n = Dim("n")
    args = (torch.randn(4, 117), *weight(10, 128), torch.randn(10))
    program = exported(linear, args, ({0: Dim("batch")}, {0: n}, {0: n}, {0: n}))
    for batch, rows in [(0, 5), (1, 1), (40, 333)]:
        args = (torch.randn(batch, 117), *weight(rows, 128), torch.randn(rows))
        require_equal(program(*args), linear(*args))


def test_an_exported_program_refuses_columns_that_do_not_fit() -> None:
    program = exported(quantize, (torch.randn(10, 128),), ({0: Dim.AUTO, 1: Dim.AUTO},))
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=r"32|even|multiple"):
        program(torch.randn(10, 80))


# --- torch.compile ----------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "quantize": (quantize, lambda size: (torch.randn(size, 128),)),
    "dequantize": (dequantize, lambda size: weight(size, 128)),
    "linear, dynamic batch": (linear, lambda size: (torch.randn(size, 3, 128), *weight(10, 128), torch.randn(10))),
    "linear, dynamic rows": (linear, lambda size: (torch.randn(3, 128), *weight(size, 128), torch.randn(size))),
    "linear, padding": (linear, lambda size: (torch.randn(size, 117), *weight(10, 128), torch.randn(10))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole_and_once_for_all_sizes(name: str) -> None:
    function, arguments = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for size in (5, 2, 9, 40, 301):
        args = arguments(size)
        require_equal(compiled(*args), function(*args))
    assert counter.frame_count == 1


def test_compiled_training_gives_the_gradients_of_eager_mode() -> None:
    packed, scales = weight(10, 128)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=counter)
    for size in (5, 40, 301):
        x, bias = torch.randn(size, 117), torch.randn(10)
        gradients = []
        for run in (linear, compiled):
            x_leaf, bias_leaf = x.clone().requires_grad_(), bias.clone().requires_grad_()
            run(x_leaf, packed, scales, bias_leaf).square().sum().backward()
            gradients.append((x_leaf.grad, bias_leaf.grad))
        require_equal(gradients[1], gradients[0])
    assert counter.frame_count == 1
