"""What the operators refuse, and in which words: a table, held to every dispatch key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import squish_nf4  # noqa: F401  (loads the operators)
from tests.support.helpers import require

OPS = torch.ops.squish


def packed(device: str, shape: tuple[int, ...] = (6, 32), dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def floats(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def quantize(
    device: str, shape: tuple[int, ...] = (6, 64), dtype: torch.dtype = torch.float32, group_size: int = 32
) -> Any:
    return OPS.quantize_nf4(torch.zeros(shape, dtype=dtype, device=device), group_size)


def dequantize(
    device: str, p: Tensor | None = None, s: Tensor | None = None, group_size: int = 32, **options: Any
) -> Any:
    p = packed(device) if p is None else p
    s = floats(device, 6, 2) if s is None else s
    return OPS.dequantize_nf4(p, s, group_size, **options)


def dequantize_out(device: str, out: Tensor) -> Any:
    return OPS.dequantize_nf4.out(packed(device), floats(device, 6, 2), 32, out=out)


def linear(
    device: str,
    x: Tensor | None = None,
    p: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 32,
) -> Any:
    x = floats(device, 3, 64) if x is None else x
    p = packed(device) if p is None else p
    s = floats(device, 6, 2) if s is None else s
    return OPS.linear_nf4(x, p, s, bias, group_size)


def grad_x(
    device: str,
    dy: Tensor | None = None,
    p: Tensor | None = None,
    s: Tensor | None = None,
    group_size: int = 32,
    d: int = 64,
) -> Any:
    dy = floats(device, 3, 6) if dy is None else dy
    p = packed(device) if p is None else p
    s = floats(device, 6, 2) if s is None else s
    return OPS._linear_nf4_grad_x(dy, p, s, group_size, d)


class Case(NamedTuple):
    id: str
    error: type[Exception]
    text: str  # the whole first line
    call: Callable[[str], Any]


f64, f16, i32 = torch.float64, torch.float16, torch.int32


def cases_of_the_packed_weight(op: str, call: Callable[..., Any]) -> list[Case]:
    """The checks that dequantize_nf4, linear_nf4 and _linear_nf4_grad_x share."""
    return [
        Case(f"{op}-packed-int8", TypeError, f"{op}: packed must be uint8, got int8",
             lambda dev: call(dev, p=packed(dev, dtype=torch.int8))),
        Case(f"{op}-packed-float", TypeError, f"{op}: packed must be uint8, got float32",
             lambda dev: call(dev, p=floats(dev, 6, 32))),
        Case(f"{op}-scales-float64", TypeError, f"{op}: scales must be float32, got float64",
             lambda dev: call(dev, s=floats(dev, 6, 2, dtype=f64))),
        Case(f"{op}-scales-bfloat16", TypeError, f"{op}: scales must be float32, got bfloat16",
             lambda dev: call(dev, s=floats(dev, 6, 2, dtype=torch.bfloat16))),
        Case(f"{op}-packed-1d", ValueError, f"{op}: packed must be 2-D (rows, columns/2), got 1-D",
             lambda dev: call(dev, p=packed(dev, (192,)))),
        Case(f"{op}-scales-3d", ValueError, f"{op}: scales must be 2-D (rows, columns/group_size), got 3-D",
             lambda dev: call(dev, s=floats(dev, 6, 2, 1))),
        Case(f"{op}-group-0", ValueError, f"{op}: group_size must be at least 1, got 0",
             lambda dev: call(dev, group_size=0)),
        Case(f"{op}-group-negative", ValueError, f"{op}: group_size must be at least 1, got -32",
             lambda dev: call(dev, group_size=-32)),
        Case(f"{op}-scales-rows", ValueError, f"{op}: scales has 5 rows but packed has 6",
             lambda dev: call(dev, s=floats(dev, 5, 2))),
        Case(f"{op}-group-no-divisor", ValueError, f"{op}: packed holds 64 columns, not a multiple of group_size=48",
             lambda dev: call(dev, group_size=48)),
        Case(f"{op}-scales-columns", ValueError,
             f"{op}: scales has 3 columns; packed holds 64 columns, which at group_size=32 need 2",
             lambda dev: call(dev, s=floats(dev, 6, 3))),
        Case(f"{op}-other-group-size", ValueError,
             f"{op}: scales has 2 columns; packed holds 64 columns, which at group_size=64 need 1",
             lambda dev: call(dev, group_size=64)),
    ]  # fmt: skip


CASES = [
    *[Case(f"quantize_nf4-w-{name}", TypeError,
           f"quantize_nf4: w must be float32, bfloat16, float16 or float64, got {name}",
           lambda dev, name=name: quantize(dev, dtype=getattr(torch, name)))
      for name in ("int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")],
    *[Case(f"quantize_nf4-w-{len(shape)}d", ValueError,
           f"quantize_nf4: w must be 2-D (rows, columns), got {len(shape)}-D",
           lambda dev, shape=shape: quantize(dev, shape))
      for shape in ((), (64,), (1, 6, 64))],
    Case("quantize_nf4-group-0", ValueError, "quantize_nf4: group_size must be at least 1, got 0",
         lambda dev: quantize(dev, group_size=0)),
    Case("quantize_nf4-group-negative", ValueError, "quantize_nf4: group_size must be at least 1, got -2",
         lambda dev: quantize(dev, group_size=-2)),
    Case("quantize_nf4-odd-columns", ValueError,
         "quantize_nf4: w has 5 columns; two share a byte, so their number must be even",
         lambda dev: quantize(dev, (6, 5), group_size=5)),
    Case("quantize_nf4-group-no-divisor", ValueError, "quantize_nf4: w has 64 columns, not a multiple of group_size=48",
         lambda dev: quantize(dev, group_size=48)),
    Case("quantize_nf4-group-too-large", ValueError, "quantize_nf4: w has 64 columns, not a multiple of group_size=128",
         lambda dev: quantize(dev, group_size=128)),
    Case("quantize_nf4-no-rows-group-no-divisor", ValueError,
         "quantize_nf4: w has 64 columns, not a multiple of group_size=3",
         lambda dev: quantize(dev, (0, 64), group_size=3)),
    *cases_of_the_packed_weight("dequantize_nf4", dequantize),
    Case("dequantize_nf4-dtype-float64", TypeError,
         "dequantize_nf4: dtype must be float32, bfloat16 or float16, got float64",
         lambda dev: dequantize(dev, dtype=f64)),
    Case("dequantize_nf4-dtype-int32", TypeError,
         "dequantize_nf4: dtype must be float32, bfloat16 or float16, got int32",
         lambda dev: dequantize(dev, dtype=i32)),
    Case("out-float64", TypeError, "dequantize_nf4: out must be float32, bfloat16 or float16, got float64",
         lambda dev: dequantize_out(dev, floats(dev, 6, 64, dtype=f64))),
    Case("out-1d", ValueError, "dequantize_nf4: out must be 2-D (rows, columns), got 1-D",
         lambda dev: dequantize_out(dev, floats(dev, 6 * 64))),
    Case("out-empty", ValueError,
         "dequantize_nf4: out has shape [0, 64]; the result has 6 rows and 64 columns, and out is never resized",
         lambda dev: dequantize_out(dev, floats(dev, 0, 64))),
    Case("out-transposed-shape", ValueError,
         "dequantize_nf4: out has shape [64, 6]; the result has 6 rows and 64 columns, and out is never resized",
         lambda dev: dequantize_out(dev, floats(dev, 64, 6))),
    Case("out-too-large", ValueError,
         "dequantize_nf4: out has shape [7, 64]; the result has 6 rows and 64 columns, and out is never resized",
         lambda dev: dequantize_out(dev, floats(dev, 7, 64))),
    Case("out-strided", ValueError, "dequantize_nf4: out must be contiguous, got strides [1, 6]",
         lambda dev: dequantize_out(dev, floats(dev, 64, 6).t())),
    *[Case(f"linear_nf4-x-{name}", TypeError, f"linear_nf4: x must be float32, bfloat16 or float16, got {name}",
           lambda dev, name=name: linear(dev, x=floats(dev, 3, 64, dtype=getattr(torch, name))))
      for name in ("int64", "complex64")],
    Case("linear_nf4-x-float64", TypeError,
         "linear_nf4: x must be float32, bfloat16 or float16, got float64; there is no product in float64: "
         "model.float() undoes model.double(), or dequantize_model(model) comes first",
         lambda dev: linear(dev, x=floats(dev, 3, 64, dtype=f64))),
    Case("linear_nf4-x-uint8", TypeError,
         "linear_nf4: x must be float32, bfloat16 or float16, got uint8; if x was cast with "
         "x.to(next(model.parameters()).dtype): the first parameter may be packed NF4 bytes, name the dtype instead",
         lambda dev: linear(dev, x=floats(dev, 3, 64, dtype=torch.uint8))),
    *cases_of_the_packed_weight("linear_nf4", linear),
    Case("linear_nf4-x-scalar", ValueError, "linear_nf4: x must have at least one dimension, got a scalar",
         lambda dev: linear(dev, x=floats(dev))),
    Case("linear_nf4-x-too-wide", ValueError,
         "linear_nf4: x has 65 columns but packed holds 64 "
         "(as many, or up to 31 more as padding, are wanted at group_size=32)",
         lambda dev: linear(dev, x=floats(dev, 3, 65))),
    Case("linear_nf4-x-too-narrow", ValueError,
         "linear_nf4: x has 32 columns but packed holds 64 "
         "(as many, or up to 31 more as padding, are wanted at group_size=32)",
         lambda dev: linear(dev, x=floats(dev, 3, 32))),
    Case("linear_nf4-x-too-narrow-odd-group", ValueError,
         "linear_nf4: x has 60 columns but packed holds 66 "
         "(as many, or up to 5 more as padding, are wanted at group_size=3)",
         lambda dev: linear(dev, x=floats(dev, 3, 60), p=packed(dev, (6, 33)), s=floats(dev, 6, 22), group_size=3)),
    Case("linear_nf4-bias-float64", TypeError,
         "linear_nf4: bias must be float32, bfloat16 or float16, got float64; there is no product in float64: "
         "model.float() undoes model.double(), or dequantize_model(model) comes first",
         lambda dev: linear(dev, bias=floats(dev, 6, dtype=f64))),
    Case("linear_nf4-bias-int32", TypeError, "linear_nf4: bias must be float32, bfloat16 or float16, got int32",
         lambda dev: linear(dev, bias=floats(dev, 6, dtype=i32))),
    Case("linear_nf4-bias-2d", ValueError, "linear_nf4: bias must be 1-D, got 2-D",
         lambda dev: linear(dev, bias=floats(dev, 1, 6))),
    Case("linear_nf4-bias-scalar", ValueError, "linear_nf4: bias must be 1-D, got 0-D",
         lambda dev: linear(dev, bias=floats(dev))),
    Case("linear_nf4-bias-size", ValueError, "linear_nf4: bias has 1 elements but packed has 6 rows",
         lambda dev: linear(dev, bias=floats(dev, 1))),
    Case("_linear_nf4_grad_x-dy-float64", TypeError,
         "_linear_nf4_grad_x: dy must be float32, bfloat16 or float16, got float64",
         lambda dev: grad_x(dev, dy=floats(dev, 3, 6, dtype=f64))),
    *cases_of_the_packed_weight("_linear_nf4_grad_x", grad_x),
    Case("_linear_nf4_grad_x-dy-scalar", ValueError,
         "_linear_nf4_grad_x: dy must have at least one dimension, got a scalar",
         lambda dev: grad_x(dev, dy=floats(dev))),
    Case("_linear_nf4_grad_x-dy-columns", ValueError, "_linear_nf4_grad_x: dy has 64 columns but packed has 6 rows",
         lambda dev: grad_x(dev, dy=floats(dev, 3, 64))),
    Case("_linear_nf4_grad_x-d", ValueError,
         "_linear_nf4_grad_x: d says 65 columns but packed holds 64 "
         "(as many, or up to 31 more as padding, are wanted at group_size=32)",
         lambda dev: grad_x(dev, d=65)),
]  # fmt: skip

DEVICES = ["cpu", "meta", "cuda"]


def available(device: str) -> str:
    if device == "cuda":
        from squish_nf4 import _build_info

        require("cuda", torch.cuda.is_available() and _build_info.CUDA_VERSION is not None, "no GPU, or a CPU build")
    return device


def refusal(case: Case, device: str) -> str:
    """The first line of the text; inductor, profilers and debug builds append a C++ trace."""
    with pytest.raises(case.error) as caught:
        case.call(device)
    assert type(caught.value) is case.error  # not a subclass that says something else
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_refused_with_type_and_text(case: Case, device: str) -> None:
    assert refusal(case, available(device)) == case.text


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_refused_with_the_same_text_under_fake_tensors(case: Case) -> None:
    with FakeTensorMode():
        assert refusal(case, "cpu") == case.text


@pytest.mark.parametrize("case", [case for case in CASES if "linear" in case.id], ids=lambda case: case.id)
def test_refused_with_the_same_text_where_gradients_are_recorded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_grad(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        return tensor.requires_grad_(dtype.is_floating_point or dtype.is_complex)

    monkeypatch.setitem(globals(), "floats", with_grad)
    assert refusal(case, "cpu") == case.text


OTHERS = [("cpu", "meta"), ("meta", "cpu"), ("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "meta"), ("meta", "cuda")]
MIXED = {
    "dequantize_nf4: scales is on {b} but packed is on {a}; they must be on one device": lambda a, b: dequantize(
        a, s=floats(b, 6, 2)
    ),
    "dequantize_nf4: out is on {b} but packed is on {a}; they must be on one device": lambda a, b: dequantize_out(
        a, floats(b, 6, 64)
    ),
    "linear_nf4: packed is on {b} but x is on {a}; they must be on one device": lambda a, b: linear(
        b, x=floats(a, 3, 64)
    ),
    "linear_nf4: scales is on {b} but packed is on {a}; they must be on one device": lambda a, b: linear(
        a, s=floats(b, 6, 2)
    ),
    "linear_nf4: bias is on {b} but x is on {a}; they must be on one device": lambda a, b: linear(a, bias=floats(b, 6)),
    "_linear_nf4_grad_x: packed is on {b} but dy is on {a}; they must be on one device": lambda a, b: grad_x(
        b, dy=floats(a, 3, 6)
    ),
    "_linear_nf4_grad_x: scales is on {b} but packed is on {a}; they must be on one device": lambda a, b: grad_x(
        a, s=floats(b, 6, 2)
    ),
}


def names_of(*devices: str) -> list[str]:
    return [str(torch.empty(0, device=device).device) for device in devices]


@pytest.mark.parametrize("devices", OTHERS, ids="-".join)
@pytest.mark.parametrize("text", MIXED)
def test_mixed_devices_are_refused(text: str, devices: tuple[str, str]) -> None:
    a, b = (available(device) for device in devices)
    with pytest.raises(RuntimeError) as caught:
        MIXED[text](a, b)
    name_a, name_b = names_of(a, b)
    assert str(caught.value).splitlines()[0] == text.format(a=name_a, b=name_b)


def test_an_out_that_shares_memory_with_an_input_is_refused() -> None:
    memory = torch.zeros(64 * 64)
    out, scales = memory.view(64, 64), memory[:64].view(64, 1)
    with pytest.raises(
        RuntimeError, match="some elements of the input tensor and the written-to tensor refer to a single"
    ):
        OPS.dequantize_nf4.out(packed("cpu", (64, 32)), scales, 64, out=out)


@pytest.mark.parametrize("shape", [(0,), (5, 64), (6, 64, 1)])
def test_a_refused_out_keeps_its_size_and_its_values(shape: tuple[int, ...]) -> None:
    out = torch.full(shape, 7.0)
    with pytest.raises(ValueError, match="dequantize_nf4: out"):
        dequantize_out("cpu", out)
    assert out.shape == shape
    assert bool((out == 7).all())


def test_nothing_is_allocated_before_the_checks() -> None:
    p, s = packed("cpu").expand(6, 32), floats("cpu", 6, 2)
    huge = torch.zeros(1).expand(1 << 30, 1 << 10)  # 4 TiB if anything made it contiguous
    with pytest.raises(ValueError, match="x has 1024 columns"):
        OPS.linear_nf4(huge, p, s)
    with pytest.raises(ValueError, match="not a multiple"):
        OPS.quantize_nf4(huge, 3)


def narrow_linear(x: Tensor, p: Tensor, s: Tensor) -> Tensor:
    return torch.ops.squish.linear_nf4(x, p, s, None, 32)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_script_and_compile_keep_the_text_in_errors_of_their_own() -> None:
    args = floats("cpu", 3, 32), packed("cpu"), floats("cpu", 6, 2)
    text = r"linear_nf4: x has 32 columns but packed holds 64"
    with pytest.raises(RuntimeError, match=text):
        torch.jit.script(narrow_linear)(*args)
    with pytest.raises(RuntimeError, match=text):
        torch.compile(narrow_linear, backend="eager", fullgraph=True)(*args)
    compiled = torch.compile(narrow_linear, backend="eager", fullgraph=True, dynamic=True)
    compiled(floats("cpu", 3, 64), *args[1:])
    with pytest.raises(RuntimeError, match=r"linear_nf4: x has s\d+ columns but packed holds"):  # the sizes' symbols
        compiled(*args)  # a size that the compiled program had not seen
