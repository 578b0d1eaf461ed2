"""torch.compile: one graph without a break, no more programs than a dense model needs, and the numbers of eager mode.

Inductor calls our operators as they are, so a layer alone gives the same bits. What it fuses around them (norms,
activations, rotary embedding) it may round differently in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

from squish_nf4 import NF4Linear
from tests.support.helpers import require_torch
from tests.support.models import Llama, quantized_llama, some_tokens

OPS = torch.ops.squish
pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("inductor", "_no_programs_left")]


@pytest.fixture
def _no_programs_left() -> None:
    torch._dynamo.reset()


def compiled(function: Any, **options: Any) -> Callable[..., Any]:
    """By inductor; a graph break is an error."""
    return torch.compile(function, fullgraph=True, **options)


def layer(bias: bool = True) -> NF4Linear:
    return NF4Linear(65, 33, bias, group_size=32)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layer_gives_the_bits_of_eager_mode(mode: Any, dtype: torch.dtype) -> None:
    eager = layer()
    run = compiled(eager, dynamic=True)
    with mode():
        for shape in [(2, 65), (40, 65), (3, 7, 65)]:
            x = torch.randn(shape).to(dtype)
            y = run(x)
            assert torch.equal(y, eager(x))
            assert (y.requires_grad, y.is_inference()) == (mode is torch.enable_grad, mode is torch.inference_mode)


def test_a_model_gives_the_numbers_of_eager_mode_at_every_batch_and_length() -> None:
    model = quantized_llama(layers=2)
    counter = CompileCounterWithBackend("inductor")
    run = compiled(model, backend=counter)
    with torch.no_grad():
        for size in [(2, 9), (5, 3), (9, 40)]:
            tokens = some_tokens(*size)
            torch._dynamo.mark_dynamic(tokens, 0)
            torch._dynamo.mark_dynamic(tokens, 1)
            torch.testing.assert_close(run(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_training_through_a_compiled_layer_gives_the_gradients_of_eager_mode() -> None:
    eager = layer()
    run = compiled(eager, dynamic=True)
    for m in (2, 40):
        x, dy = leaf(m, 65), torch.randn(m, 33)
        expected = torch.autograd.grad(eager(x), (x, eager.bias), dy)
        found = torch.autograd.grad(run(x), (x, eager.bias), dy)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])  # the bias sums dy: inductor's own code


def test_a_compiled_training_step_of_a_model() -> None:
    model = nn.Sequential(layer(), nn.GELU(), NF4Linear(33, 9, group_size=32))
    biases = [model[0].bias, model[2].bias]
    gradients = []
    for run in (model, compiled(model)):
        x = torch.ones(7, 65, requires_grad=True)
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *biases]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_autocast_outside_and_inside_of_what_is_compiled() -> None:
    eager = layer()
    x = torch.randn(3, 65)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return eager(x)

    expected = eager(x.bfloat16())
    assert expected.dtype == torch.bfloat16
    assert torch.equal(compiled(inside)(x), expected)
    run = compiled(eager)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x), expected)
    assert torch.equal(run(x), eager(x))  # another program: autocast is off


def test_functional_call_and_torch_func_gradients() -> None:
    eager = layer()
    x, bias = torch.randn(3, 65), torch.randn(33)

    def gradients(x: Tensor, bias: Tensor) -> Any:
        def loss(x: Tensor, bias: Tensor) -> Tensor:
            return functional_call(eager, {"bias": bias}, (x,)).square().sum()

        return grad(loss, (0, 1))(x, bias)

    torch.testing.assert_close(compiled(gradients)(x, bias), gradients(x, bias))


def test_out_is_written_by_a_compiled_program() -> None:
    require_torch("2.13", "cannot compile an out= operator of a library")
    packed, scales = OPS.quantize_nf4(torch.randn(6, 64))

    def into(packed: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        OPS.dequantize_nf4.out(packed, scales, 32, out=out)
        return out * 2

    out = torch.zeros(6, 64)
    doubled = compiled(into)(packed, scales, out)
    assert torch.equal(out, OPS.dequantize_nf4(packed, scales))
    assert torch.equal(doubled, 2 * out)


def test_an_x_of_another_width_is_refused() -> None:
    run = compiled(layer(), dynamic=True)
    run(torch.randn(3, 65))
    with pytest.raises(Exception, match="NF4Linear: x has 66 columns, but in_features is 65"):
        run(torch.randn(3, 66))


# --- the number of programs -------------------------------------------------------------------------------------------


def programs(function: Any, inputs: list[Tensor], backend: str = "aot_eager", **options: Any) -> list[int]:
    """How many programs there are after each call. The count is dynamo's, so a cheap backend tells it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(function, fullgraph=True, backend=counter, **options)
    counts = []
    for x in inputs:
        with torch.no_grad():
            assert torch.equal(run(x), function(x))
        counts.append(counter.frame_count)
    return counts


def test_one_program_for_each_rank_and_dtype_and_one_more_where_a_size_first_changes() -> None:
    shapes = [(5,), (7,), (90,), (2, 3), (4, 30), (2, 2, 2), (3, 4, 5)]
    inputs = [torch.randn(*shape, 65) for shape in shapes]
    assert programs(layer(), inputs) == [1, 2, 2, 3, 3, 4, 4]
    inputs += [x.bfloat16() for x in inputs]
    assert programs(layer(), inputs, dynamic=True) == [1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6]


def test_a_quantized_model_needs_as_many_programs_as_the_dense_one() -> None:
    sizes = [(2, 9), (3, 9), (3, 17), (5, 40), (90, 4), (1, 9), (4, 1)]
    inputs = [some_tokens(*size) for size in sizes]
    dense = programs(Llama(layers=2).eval(), inputs, "eager")
    assert dense[2:5] == [3, 3, 3]  # batch changed, length changed, and then no more
    assert programs(quantized_llama(layers=2), inputs, "eager") == dense
