"""The gradients of linear_nf4: to x and to bias, of any order, through every way that torch takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vjp

from squish_nf4 import NF4Linear, linear_nf4
from tests.support.helpers import relative

OPS = torch.ops.squish
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The operator is linear: a wide step costs no truncation error, and in float32 it keeps the rounding error small.
NUMERIC = {"eps": 1e-1, "atol": 1e-3, "rtol": 1e-3}

NOT_DOUBLE = pytest.mark.filterwarnings(r"ignore:Input #\d requires gradient and is not a double precision:UserWarning")
JIT = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # forward_ad scripts too


def weight(n: int = 6, d: int = 64, group_size: int = 32) -> tuple[Tensor, Tensor]:
    return OPS.quantize_nf4(torch.randn(n, d, generator=torch.Generator().manual_seed(1)), group_size)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def dense(packed: Tensor, scales: Tensor, group_size: int = 32, d: int | None = None) -> Tensor:
    return OPS.dequantize_nf4(packed, scales, group_size)[:, :d]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


CHECKED = [
    ((3, 64), 32, 6),  # x, group size, rows
    ((64,), 32, 6),
    ((2, 2, 61), 32, 5),  # padding
    ((3, 12), 3, 5),  # an odd group
    ((3, 11), 3, 5),
    ((30, 8), 4, 3),  # more than the fused sizes
    ((1, 2), 1, 1),
]


@NOT_DOUBLE
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize(("shape", "group_size", "n"), CHECKED)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_gradients_are_those_of_finite_differences(
    check: Callable[..., bool], shape: tuple[int, ...], group_size: int, n: int, with_bias: bool
) -> None:
    columns = -(-shape[-1] // (2 * group_size)) * 2 * group_size if shape[-1] % group_size else shape[-1]
    w = torch.randn(n, columns)
    w[:, shape[-1] :] = 0
    packed, scales = OPS.quantize_nf4(w, group_size)
    if with_bias:
        assert check(lambda x, b: OPS.linear_nf4(x, packed, scales, b, group_size), (leaf(*shape), leaf(n)), **NUMERIC)
    else:
        assert check(lambda x: OPS.linear_nf4(x, packed, scales, None, group_size), (leaf(*shape),), **NUMERIC)


@NOT_DOUBLE
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_the_gradient_operator_has_gradients_of_its_own(check: Callable[..., bool]) -> None:
    packed, scales = weight()
    for d in (64, 61):
        assert check(lambda dy, d=d: OPS._linear_nf4_grad_x(dy, packed, scales, 32, d), (leaf(3, 6),), **NUMERIC)


@pytest.mark.parametrize("m", [1, 16, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 63, 33])
def test_the_gradient_of_x_is_dy_times_the_decoded_weight(d: int, dtype: torch.dtype, m: int) -> None:
    packed, scales = weight(70)
    x, dy = leaf(m, d, dtype=dtype), torch.randn(m, 70).to(dtype)
    (dx,) = torch.autograd.grad(OPS.linear_nf4(x, packed, scales), x, dy)
    assert dx.dtype == dtype
    decoded = dense(packed, scales, d=d)
    exact = dy.double() @ decoded.double()
    allowed = 1e-6 if dtype == torch.float32 else 1.2 * relative(dy @ decoded.to(dtype), exact)
    assert relative(dx, exact) <= allowed  # 16 bits: as good as a dense layer


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_bias_has_its_own_dtype_and_is_summed_in_float32(
    dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    packed, scales = weight()
    bias = leaf(6, dtype=bias_dtype)
    y = OPS.linear_nf4(torch.zeros(20, 30, 64, dtype=dtype), packed, scales, bias)
    (db,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert db.dtype == bias_dtype
    assert torch.equal(db, torch.full((6,), 600.0).to(bias_dtype))  # a sum in bfloat16 would stop at 256
    only_x = OPS.linear_nf4(leaf(3, 64), packed, scales, bias.detach())
    assert torch.autograd.grad(only_x.sum(), bias, allow_unused=True) == (None,)


def test_the_gradient_of_bias_for_a_single_activation_is_dy() -> None:
    packed, scales = weight()
    x, bias, dy = leaf(64), leaf(6), torch.randn(6)
    dx, db = torch.autograd.grad(OPS.linear_nf4(x, packed, scales, bias), (x, bias), dy)
    assert torch.equal(db, dy)
    assert close(dx, dy @ dense(packed, scales))


def test_the_gradient_of_bias_alone_keeps_no_weight() -> None:
    packed, scales = weight()
    bias = leaf(6)
    y = OPS.linear_nf4(torch.randn(3, 64), packed, scales, bias)
    scales.mul_(2)  # noticed only where the weight was kept
    (db,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(db, torch.full((6,), 3.0))


def test_packed_and_scales_get_no_gradient() -> None:
    packed, scales = weight()
    scales.requires_grad_()
    assert not OPS.linear_nf4(torch.randn(3, 64), packed, scales).requires_grad
    x = leaf(3, 64)
    OPS.linear_nf4(x, packed, scales).sum().backward()
    assert x.grad is not None
    assert scales.grad is None


def test_without_a_leaf_nothing_is_recorded() -> None:
    packed, scales = weight()
    y = OPS.linear_nf4(torch.randn(3, 64), packed, scales, torch.randn(6))
    assert not y.requires_grad
    assert y.grad_fn is None


# --- gradients of every shape and stride -----------------------------------------------------------------------------


def strided(kind: str, m: int, n: int) -> Tensor:
    return {
        "expanded": torch.ones(()).expand(m, n),
        "one row expanded": torch.randn(1, n).expand(m, n),
        "transposed": torch.randn(n, m).t(),
        "columns apart": torch.randn(m, 2 * n)[:, ::2],
        "rows apart": torch.randn(m, 2 * n)[:, :n],
    }[kind]


@pytest.mark.parametrize("kind", ["expanded", "one row expanded", "transposed", "columns apart", "rows apart"])
@pytest.mark.parametrize("m", [3, 40])
def test_a_strided_dy_gives_the_gradients_of_a_contiguous_one(kind: str, m: int) -> None:
    packed, scales = weight()
    dy = strided(kind, m, 6)
    results = []
    for gradient in (dy, dy.clone(memory_format=torch.contiguous_format)):
        x, bias = leaf(m, 61), leaf(6)
        results.append(torch.autograd.grad(OPS.linear_nf4(x, packed, scales, bias), (x, bias), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)  # at::sum's order depends on the strides


def test_sum_backward_with_a_strided_x() -> None:
    packed, scales = weight()
    x = torch.randn(64, 5, requires_grad=True)
    OPS.linear_nf4(x.t(), packed, scales).sum().backward()
    assert x.grad is not None
    assert close(x.grad, dense(packed, scales).sum(0)[:, None].expand(64, 5))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_an_empty_batch_has_empty_and_zero_gradients(shape: tuple[int, ...]) -> None:
    packed, scales = weight()
    x, bias = leaf(*shape), leaf(6)
    OPS.linear_nf4(x, packed, scales, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros(6))


def test_a_layer_without_rows_or_columns_has_zero_or_empty_gradients() -> None:
    x = leaf(3, 64)
    OPS.linear_nf4(x, *OPS.quantize_nf4(torch.ones(0, 64))).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(3, 64))
    x, bias = leaf(3, 0), leaf(6)
    OPS.linear_nf4(x, *OPS.quantize_nf4(torch.ones(6, 0)), bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.shape == (3, 0)
    assert torch.equal(bias.grad, torch.full((6,), 3.0))


# --- higher orders ----------------------------------------------------------------------------------------------------


def test_a_gradient_penalty_reaches_what_came_before() -> None:
    packed, scales = weight()
    w, first = dense(packed, scales), leaf(64, 64)

    def penalty(layer: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.ones(3, 64) @ first
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(dx.square().sum(), first)
        return result

    found, expected = penalty(lambda x: OPS.linear_nf4(x, packed, scales)), penalty(lambda x: x @ w.T)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_backward_twice_needs_retain_graph_and_then_accumulates() -> None:
    packed, scales = weight()
    x = leaf(3, 64)
    y = OPS.linear_nf4(x, packed, scales)
    y.sum().backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_a_weight_overwritten_before_the_backward_is_noticed() -> None:
    packed, scales = weight()
    y = OPS.linear_nf4(leaf(3, 64), packed, scales)
    scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- torch.func -------------------------------------------------------------------------------------------------------


def test_torch_func_takes_gradients_of_any_order() -> None:
    packed, scales = weight()
    w, x, bias = dense(packed, scales), torch.randn(3, 64), torch.randn(6)

    def loss(x: Tensor, b: Tensor) -> Tensor:
        return OPS.linear_nf4(x, packed, scales, b).square().sum()

    def dense_loss(x: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(x, w, b).square().sum()

    for found, expected in zip(grad(loss, (0, 1))(x, bias), grad(dense_loss, (0, 1))(x, bias), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    second = grad(lambda x: grad(loss)(x, bias).square().sum())(x)
    assert torch.allclose(second, grad(lambda x: grad(dense_loss)(x, bias).square().sum())(x), rtol=1e-4, atol=1e-2)
    y, pullback = vjp(lambda x: OPS.linear_nf4(x, packed, scales, bias), x)
    assert torch.equal(y, OPS.linear_nf4(x, packed, scales, bias))
    dy = torch.randn(3, 6)
    assert close(pullback(dy)[0], dy @ w)


def test_functional_call_takes_gradients_of_the_bias() -> None:
    layer, x = NF4Linear(64, 6), torch.randn(3, 64)
    gradient = grad(lambda bias: functional_call(layer, {"bias": bias}, (x,)).sum())(torch.zeros(6))
    assert torch.equal(gradient, torch.full((6,), 3.0))


# --- what is refused, and the modes ----------------------------------------------------------------------------------


@JIT
@pytest.mark.parametrize("which", ["x", "bias", "dy"])
def test_forward_mode_is_refused_in_words(which: str) -> None:
    packed, scales = weight()
    with fwad.dual_level():
        x, bias, dy = torch.randn(3, 64), torch.randn(6), torch.randn(3, 6)
        if which == "dy":
            dy = fwad.make_dual(dy, torch.ones_like(dy))
            with pytest.raises(NotImplementedError, match=r"^_linear_nf4_grad_x: forward-mode .*use reverse mode"):
                OPS._linear_nf4_grad_x(dy, packed, scales, 32, 64)
            return
        x = fwad.make_dual(x, torch.ones_like(x)) if which == "x" else x
        bias = fwad.make_dual(bias, torch.ones_like(bias)) if which == "bias" else bias
        with pytest.raises(NotImplementedError, match=r"^linear_nf4: forward-mode .*use reverse mode"):
            OPS.linear_nf4(x, packed, scales, bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(mode: Any) -> None:
    packed, scales = weight()
    x, bias = leaf(3, 64), leaf(6)
    expected = OPS.linear_nf4(x, packed, scales, bias)
    with mode():
        y = OPS.linear_nf4(x, packed, scales, bias)
        assert not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(y, expected)
        OPS.quantize_nf4(torch.randn(6, 64))
        assert torch.equal(OPS.dequantize_nf4.out(packed, scales, out=torch.empty(6, 64)), dense(packed, scales))


def test_inference_tensors_compute_and_are_refused_for_training() -> None:
    with torch.inference_mode():
        packed, scales = weight()
    assert OPS.linear_nf4(torch.randn(3, 64), packed, scales).shape == (3, 6)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        OPS.linear_nf4(leaf(3, 64), packed, scales)


@JIT
def test_a_scripted_module_has_the_gradients_of_the_layer() -> None:
    layer = NF4Linear(61, 6)
    scripted = torch.jit.script(layer)
    gradients = []
    for module in (layer, scripted):
        x = leaf(3, 61)
        module.zero_grad()
        module(x).square().sum().backward()
        gradients.append((x.grad, module.bias.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    layer = nn.Sequential(NF4Linear(64, 64), nn.GELU(), NF4Linear(64, 6))
    x, again = leaf(3, 64), leaf(3, 64)
    layer(x).sum().backward()
    torch.utils.checkpoint.checkpoint(layer, again, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_the_python_function_has_the_gradient_of_the_operator() -> None:
    packed, scales = weight()
    x = leaf(3, 64)
    linear_nf4(x, packed, scales).sum().backward()
    assert x.grad is not None
    assert close(x.grad, dense(packed, scales).sum(0).expand(3, 64))
