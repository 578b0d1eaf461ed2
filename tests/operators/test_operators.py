"""The operators as torch sees them: schemas, shapes, autograd of quantize and dequantize, out=, autocast, opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from squish_nf4 import dequantize_nf4, linear_nf4, quantize_nf4
from tests.support.helpers import require_torch

OPS = torch.ops.squish

SCHEMAS = {
    "quantize_nf4": "squish::quantize_nf4(Tensor w, int group_size=32) -> (Tensor packed, Tensor scales)",
    "dequantize_nf4": "squish::dequantize_nf4(Tensor packed, Tensor scales, int group_size=32, *, "
    "ScalarType? dtype=None) -> Tensor",
    "dequantize_nf4.out": "squish::dequantize_nf4.out(Tensor packed, Tensor scales, int group_size=32, *, "
    "Tensor(a!) out) -> Tensor(a!)",
    "linear_nf4": "squish::linear_nf4(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None, int group_size=32) "
    "-> Tensor",
    "_survey_nf4": "squish::_survey_nf4(Tensor w, Tensor packed, Tensor scales, int group_size) -> Tensor",
    "_linear_nf4_grad_x": "squish::_linear_nf4_grad_x(Tensor dy, Tensor packed, Tensor scales, int group_size, "
    "SymInt d) -> Tensor",
}


def overload(name: str) -> Any:
    operator, _, suffix = name.partition(".")
    return getattr(getattr(OPS, operator), suffix or "default")


def weight(n: int = 6, d: int = 64, group_size: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    return OPS.quantize_nf4(torch.randn(n, d, generator=generator).to(dtype), group_size)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_the_contract(name: str) -> None:
    assert str(overload(name)._schema) == SCHEMAS[name]


def test_there_is_no_other_operator() -> None:
    registered = {schema for schema in torch._C._dispatch_get_all_op_names() if schema.startswith("squish::")}
    assert registered == {f"squish::{name}" for name in SCHEMAS}


def test_default_group_size_is_32_in_operators_and_functions() -> None:
    w = torch.randn(4, 64)
    packed, scales = OPS.quantize_nf4(w)
    assert scales.shape == (4, 2)
    assert torch.equal(quantize_nf4(w)[0], packed)
    dense = OPS.dequantize_nf4(packed, scales)
    assert torch.equal(dequantize_nf4(packed, scales), dense)
    assert torch.equal(dense, OPS.dequantize_nf4(packed, scales, 32))
    x = torch.randn(3, 64)
    assert torch.equal(linear_nf4(x, packed, scales), OPS.linear_nf4(x, packed, scales, None, 32))
    assert torch.equal(linear_nf4(x, packed, scales), OPS.linear_nf4(x, packed, scales))


@pytest.mark.parametrize("group_size", [1, 2, 3, 64, 100])
def test_a_group_size_is_taken_as_given(group_size: int) -> None:
    w = torch.randn(4, 2 * group_size * 3)
    _, scales = OPS.quantize_nf4(w, group_size)
    assert scales.shape == (4, 6)
    assert scales.equal(w.view(4, 6, group_size).abs().amax(2))


# --- shapes and dtypes without data: meta and fake tensors -----------------------------------------------------------

SHAPES = [(0, 64, 32), (6, 0, 32), (0, 0, 1), (1, 2, 1), (5, 6, 3), (7, 200, 100), (64, 128, 64)]


def described(device: str, n: int, d: int, group_size: int) -> list[tuple[Any, ...]]:
    """Shape, strides and dtype of every result, for tensors created on ``device``."""
    w = torch.zeros(n, d, device=device, dtype=torch.bfloat16)
    packed, scales = OPS.quantize_nf4(w, group_size)
    out = torch.zeros(n, d, device=device)
    results = [packed, scales, OPS.dequantize_nf4(packed, scales, group_size)]
    results += [OPS.dequantize_nf4(packed, scales, group_size, dtype=torch.float16)]
    results += [OPS.dequantize_nf4.out(packed, scales, group_size, out=out)]
    for shape in [(d,), (3, d), (0, d), (2, 3, d)]:
        x = torch.zeros(shape, device=device, dtype=torch.float16)
        y = OPS.linear_nf4(x, packed, scales, torch.zeros(n, device=device), group_size)
        results += [y, OPS._linear_nf4_grad_x(y, packed, scales, group_size, d)]
    assert all(result.device.type == device for result in results)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in results]


@pytest.mark.parametrize(("n", "d", "group_size"), SHAPES)
def test_meta_and_fake_results_have_the_real_shapes(n: int, d: int, group_size: int) -> None:
    real = described("cpu", n, d, group_size)
    assert described("meta", n, d, group_size) == real
    with FakeTensorMode():
        assert described("cpu", n, d, group_size) == real


# --- opcheck: schema, autograd registration, fake tensors, ahead-of-time dispatch with dynamic shapes ----------------


def x_of(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


OPCHECKS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "quantize_nf4": [
        ((torch.randn(6, 64),), {}),
        ((torch.randn(6, 64, dtype=torch.bfloat16), 64), {}),
        ((torch.randn(6, 6, dtype=torch.float64), 3), {}),
        ((torch.randn(64, 6).t(), 16), {}),
        ((torch.randn(0, 64), 16), {}),
        ((torch.nn.Parameter(torch.randn(6, 64)), 16), {}),
    ],
    "dequantize_nf4": [
        (weight(), {}),
        ((*weight(dtype=torch.float16), 32), {"dtype": torch.bfloat16}),
        ((*weight(5, 12, 3), 3), {"dtype": torch.float16}),
        ((*weight(0, 64, 32), 32), {}),
    ],
    "dequantize_nf4.out": [
        (weight(), {"out": torch.empty(6, 64)}),
        ((*weight(6, 64, 16), 16), {"out": torch.empty(6, 64, dtype=torch.float16)}),
        ((*weight(0, 64, 16), 16), {"out": torch.empty(0, 64)}),
    ],
    "linear_nf4": [
        ((x_of(3, 64), *weight()), {}),
        ((x_of(64), *weight(), x_of(6)), {}),
        ((x_of(2, 5, 61, dtype=torch.bfloat16), *weight(), x_of(6)), {}),
        ((x_of(40, 64, dtype=torch.float16, grad=False), *weight(), x_of(6, dtype=torch.float16), 32), {}),
        ((x_of(5, 12), *weight(5, 12, 3), None, 3), {}),
        ((x_of(0, 64), *weight(), x_of(6)), {}),
        ((x_of(64, 3).t(), *weight(), None, 32), {}),
    ],
    "_survey_nf4": [
        ((torch.randn(6, 64), *weight(), 32), {}),
        ((torch.randn(6, 64).to(torch.bfloat16).t().contiguous().t(), *weight(), 32), {}),
        ((torch.randn(0, 64), *weight(0, 64, 16), 16), {}),
    ],
    "_linear_nf4_grad_x": [
        ((x_of(3, 6), *weight(), 32, 64), {}),
        ((x_of(6, dtype=torch.bfloat16), *weight(), 32, 61), {}),
        ((x_of(2, 5, 6, grad=False), *weight(), 32, 64), {}),
        ((x_of(0, 6), *weight(), 32, 64), {}),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, cases in OPCHECKS.items() for index in range(len(cases))]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck_is_clean(name: str, index: int) -> None:
    if name.endswith(".out"):
        require_torch("2.13", "cannot trace an out= operator of a library")
    args, kwargs = OPCHECKS[name][index]
    torch.library.opcheck(overload(name), args, kwargs)


# --- quantize and dequantize have no autograd ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda w: w.requires_grad_(), lambda w: w.requires_grad_() * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_quantize_results_have_no_gradient_even_of_a_parameter(make: Any, dtype: torch.dtype, strided: bool) -> None:
    w = make(torch.randn(64, 6, dtype=dtype).t() if strided else torch.randn(6, 64, dtype=dtype))
    for result in (*OPS.quantize_nf4(w, 16), *quantize_nf4(w, 16)):
        assert not result.requires_grad
        assert result.grad_fn is None
        assert type(result) is Tensor


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_dequantize_result_has_no_gradient_even_of_scales_that_require_it(dtype: torch.dtype, strided: bool) -> None:
    packed, scales = weight()
    scales = scales.t().contiguous().t() if strided else scales
    dense = OPS.dequantize_nf4(packed, scales.requires_grad_(), dtype=dtype)
    assert not dense.requires_grad
    assert dense.grad_fn is None


# --- out= -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_holds_what_dequantize_returns_and_is_returned(dtype: torch.dtype) -> None:
    packed, scales = weight()
    out = torch.full((6, 64), 7.0, dtype=dtype)
    address = out.data_ptr()
    assert OPS.dequantize_nf4.out(packed, scales, 32, out=out) is out
    assert out.data_ptr() == address
    assert torch.equal(out, OPS.dequantize_nf4(packed, scales, 32, dtype=dtype))


def test_out_has_the_out_tag_and_no_other_operator_has() -> None:
    require_torch("2.13", "has no such tag")
    assert {name for name in SCHEMAS if torch.Tag.out in overload(name).tags} == {"dequantize_nf4.out"}


def test_out_bumps_the_version_so_that_a_backward_does_not_use_overwritten_values() -> None:
    packed, scales = weight()
    x, out = torch.randn(6, 64, requires_grad=True), torch.randn(6, 64)
    y = (x * out).sum()  # saves out
    version = out._version
    OPS.dequantize_nf4.out(packed, scales, 32, out=out)
    assert out._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_out_bumps_the_version_of_the_tensor_that_it_is_a_view_of() -> None:
    packed, scales = weight()
    base = torch.randn(12, 64)
    OPS.dequantize_nf4.out(packed, scales, 32, out=base[6:])
    assert base._version == 1
    assert torch.equal(base[6:], OPS.dequantize_nf4(packed, scales, 32))


def test_an_out_that_requires_grad_is_refused_while_gradients_are_recorded() -> None:
    packed, scales = weight()
    out = torch.zeros(6, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="dequantize_nf4: out requires grad"):
        OPS.dequantize_nf4.out(packed, scales, 32, out=out)
    assert not bool(out.any())
    with torch.no_grad():
        OPS.dequantize_nf4.out(packed, scales, 32, out=out)
    assert torch.equal(out, OPS.dequantize_nf4(packed, scales, 32))
    assert out.requires_grad


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [3, 40])
def test_autocast_casts_x_and_leaves_bias_and_scales_in_float32(dtype: torch.dtype, m: int) -> None:
    packed, scales = weight()
    x, bias = torch.randn(m, 64), torch.randn(6)
    with torch.autocast("cpu", dtype):
        y = OPS.linear_nf4(x, packed, scales, bias)
    assert y.dtype == dtype
    assert torch.equal(y, OPS.linear_nf4(x.to(dtype), packed, scales, bias))
    # scales and bias rounded to 16 bits would give other values
    assert not torch.equal(y, OPS.linear_nf4(x.to(dtype), packed, scales.to(dtype).float(), bias))


def test_autocast_gives_gradients_in_the_dtypes_of_the_leaves() -> None:
    packed, scales = weight()
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS.linear_nf4(x, packed, scales, bias)
    y.float().sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    assert torch.equal(bias.grad, torch.full((6,), 3.0))


def test_autocast_does_not_touch_quantize_and_dequantize() -> None:
    w = torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        packed, scales = OPS.quantize_nf4(w, 16)
        dense = OPS.dequantize_nf4(packed, scales, 16)
    assert scales.dtype == dense.dtype == torch.float32
    assert torch.equal(packed, OPS.quantize_nf4(w, 16)[0])


# --- inputs are never modified ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_are_never_modified(m: int, dtype: torch.dtype) -> None:
    packed, scales = weight()
    inputs = [
        packed,
        scales,
        torch.randn(m, 61).to(dtype),
        torch.randn(6),
        torch.randn(m, 6).to(dtype),
        torch.randn(6, 64),
    ]
    before = [(t.clone(), t._version) for t in inputs]
    packed, scales, x, bias, dy, w = inputs
    OPS.quantize_nf4(w)
    OPS.dequantize_nf4(packed, scales)
    OPS.dequantize_nf4.out(packed, scales, out=torch.empty(6, 64))
    OPS.linear_nf4(x, packed, scales, bias)
    OPS._linear_nf4_grad_x(dy, packed, scales, 32, 61)
    for tensor, (copy, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


# --- the Python functions look for non-finite weights, where looking is possible -------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_quantize_nf4_refuses_a_non_finite_weight_and_says_where(value: float, dtype: torch.dtype) -> None:
    w = torch.randn(6, 64, dtype=dtype)
    w[4, 37] = value
    with pytest.raises(ValueError, match=rf"^quantize_nf4: w holds {value} at row 4, column 37; NF4 encodes finite"):
        quantize_nf4(w, 16)


def test_quantize_nf4_refuses_a_float64_that_float32_cannot_hold() -> None:
    w = torch.randn(6, 64, dtype=torch.float64)
    w[2, 3] = 1e300
    with pytest.raises(ValueError, match=r"quantize_nf4: w holds 1e\+300 at row 2, column 3"):
        quantize_nf4(w, 16)


def test_the_operator_itself_marks_the_group_with_a_nan_scale() -> None:
    w = torch.randn(6, 64)
    w[4, 37] = float("inf")
    packed, scales = OPS.quantize_nf4(w, 16)
    assert scales.isnan().nonzero().tolist() == [[4, 2]]
    assert OPS.dequantize_nf4(packed, scales, 16)[4].isnan().nonzero().flatten().tolist() == list(range(32, 48))


def test_there_is_no_look_under_make_fx_functionalize_meta_and_fake_tensors() -> None:
    w = torch.full((6, 64), float("nan"))
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda w: quantize_nf4(w))(torch.randn(6, 64))
    assert bool(graph(w)[1].isnan().all())
    assert bool(torch.func.functionalize(lambda w: quantize_nf4(w))(w)[1].isnan().all())
    assert quantize_nf4(w.to("meta"))[1].is_meta
    with FakeTensorMode():
        assert quantize_nf4(torch.empty(6, 64))[0].shape == (6, 32)
    with pytest.raises(ValueError, match="finite"):
        quantize_nf4(w)  # the enemy of the four lines above
