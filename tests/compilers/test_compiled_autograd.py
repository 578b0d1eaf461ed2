"""Compiled autograd: the whole backward as one graph, with the gradients of eager mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

from squish_nf4 import NF4Linear

# torch looks at the .grad of what its own nodes saved
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _no_programs_left() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiling_the_backward(backend: str = "eager") -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = compiled_autograd._enable(torch.compile(backend=backend))
    return context


def layers() -> nn.Sequential:
    return nn.Sequential(
        NF4Linear(65, 33, group_size=32), nn.GELU(), NF4Linear(33, 9, bias=False, dtype=torch.bfloat16), nn.Linear(9, 4)
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a step, to x and to every parameter that has one."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [gradient for gradient in found if gradient is not None]


def require_the_gradients_of_eager_mode(model: nn.Module, x: Tensor, backend: str = "eager") -> None:
    expected = gradients(model, x)
    with compiling_the_backward(backend):
        found = gradients(model, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_has_the_gradients_of_eager_mode_in_as_many_captures_as_a_dense_one() -> None:
    captures = []
    for layer in (NF4Linear(65, 33, group_size=32), nn.Linear(65, 33)):
        counters.clear()
        for shape in [(3, 65), (4, 65), (40, 65), (65,)]:
            require_the_gradients_of_eager_mode(layer, torch.randn(shape))
        captures.append(counters["compiled_autograd"]["captures"])
    assert 0 < captures[0] <= captures[1]


def test_several_layers_have_the_gradients_of_eager_mode_through_aot_autograd() -> None:
    require_the_gradients_of_eager_mode(layers(), torch.randn(3, 65), "aot_eager")


def test_a_training_step_compiles_with_its_backward() -> None:
    model, x = layers(), torch.randn(3, 65)
    expected = gradients(model, x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.testing.assert_close(torch.compile(gradients, backend="aot_eager")(model, x), expected)


def test_one_gradient_alone_and_then_the_other() -> None:
    layer, x = NF4Linear(65, 33), torch.randn(3, 65, requires_grad=True)
    for leaves in ([x], [layer.bias], [x, layer.bias]):
        expected = torch.autograd.grad(layer(x).square().sum(), leaves)
        with compiling_the_backward():
            found = torch.autograd.grad(layer(x).square().sum(), leaves)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("leaf", ["x", "bias"])
def test_one_leaf_alone(leaf: str) -> None:
    layer = NF4Linear(65, 33)
    layer.bias.requires_grad_(leaf == "bias")
    x = torch.randn(3, 65, requires_grad=leaf == "x")
    wanted = x if leaf == "x" else layer.bias
    (expected,) = torch.autograd.grad(layer(x).square().sum(), wanted)
    with compiling_the_backward():
        (found,) = torch.autograd.grad(layer(x).square().sum(), wanted)
    assert torch.equal(found, expected)


def test_a_layer_with_another_dtype_of_bias_is_another_graph() -> None:
    """What is no tensor is a constant of the graph: the dtype of the bias, and the group size."""
    x = torch.randn(3, 64)
    for group_size, dtype in [(32, torch.float32), (32, torch.bfloat16), (16, torch.bfloat16)]:
        require_the_gradients_of_eager_mode(NF4Linear(64, 8, group_size=group_size, dtype=dtype), x)


def test_a_gradient_penalty_compiles_the_gradient_of_the_gradient() -> None:
    layer, first = NF4Linear(65, 33), torch.randn(65, 65, requires_grad=True)

    def penalty() -> Tensor:
        x = torch.ones(3, 65) @ first
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        return dx.square().sum()

    (expected,) = torch.autograd.grad(penalty(), first)
    loss = penalty()
    with compiling_the_backward():
        (found,) = torch.autograd.grad(loss, first)
    assert torch.equal(found, expected)


def test_weights_that_saved_tensor_hooks_packed_away_are_unpacked_in_the_graph() -> None:
    layer, x = NF4Linear(65, 33), torch.randn(3, 65, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda packed: packed.clone()):
        y = layer(x)
    with compiling_the_backward():
        (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def test_backward_twice_needs_retain_graph() -> None:
    layer, x = NF4Linear(65, 33), torch.randn(3, 65, requires_grad=True)
    y = layer(x).sum()
    with compiling_the_backward():
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()
