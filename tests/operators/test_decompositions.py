"""The operators in plain torch: the same bits or numbers, and programs without any operator of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

import squish_nf4
from squish_nf4 import NF4Linear
from tests.support.models import quantized_llama, some_tokens

OPS = torch.ops.squish
TABLE = squish_nf4.decompositions()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of the norm; 16 bits: one step


def odd_weight(n: int, d: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Every byte of the format, and scales of any bits: negative, NaN, infinite, subnormal."""
    packed = torch.randint(0, 256, (n, d // 2), dtype=torch.uint8)
    scales = torch.randn(n, d // group_size)
    if scales.numel() > 5:
        odd = torch.tensor([0x7FC00000, -1, 0x7F800000, 1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        scales.view(-1)[:5] = odd
    return packed, scales


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if str(node.target).startswith("squish")}


def close(found: Tensor, expected: Tensor) -> bool:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.numel() == 0:
        return True
    exact = expected.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm()) < ROUNDING[expected.dtype]


# --- the operators one by one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 32, 100])
@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_dequantize_gives_the_bits_of_the_operator(n: int, group_size: int, dtype: torch.dtype | None) -> None:
    packed, scales = odd_weight(n, 4 * group_size, group_size)
    expected = OPS.dequantize_nf4(packed, scales, group_size, dtype=dtype)
    found = TABLE[OPS.dequantize_nf4.default](packed, scales, group_size, dtype=dtype)
    assert found.dtype == expected.dtype
    assert torch.equal(bits(found), bits(expected))
    out = torch.empty_like(expected)
    assert TABLE[OPS.dequantize_nf4.out](packed, scales, group_size, out=out) is out
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((64,), 32), ((3, 64), 32), ((2, 40, 61), 32), ((0, 64), 32), ((3, 11), 3)]
)
def test_linear_and_its_gradient_give_the_numbers_of_the_operator(
    shape: tuple[int, ...], group_size: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    columns = 64 if group_size == 32 else 12
    packed, scales = OPS.quantize_nf4(torch.randn(9, columns), group_size)
    x, bias = torch.randn(shape).to(dtype), None if bias_dtype is None else torch.randn(9).to(bias_dtype)
    y = OPS.linear_nf4(x, packed, scales, bias, group_size)
    assert close(TABLE[OPS.linear_nf4.default](x, packed, scales, bias, group_size), y)
    dx = OPS._linear_nf4_grad_x(y, packed, scales, group_size, shape[-1])
    assert close(TABLE[OPS._linear_nf4_grad_x.default](y, packed, scales, group_size, shape[-1]), dx)


def test_the_bias_is_added_before_the_one_rounding() -> None:
    packed, scales = OPS.quantize_nf4(torch.ones(1, 2), 2)
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)  # 257 is no bfloat16: rounded first, the bias would be lost
    y = TABLE[OPS.linear_nf4.default](x, packed, scales, torch.ones(1), 2)
    assert y.item() == 258.0 == OPS.linear_nf4(x, packed, scales, torch.ones(1), 2).item()


def test_defaults_are_those_of_the_schemas() -> None:
    packed, scales = OPS.quantize_nf4(torch.randn(6, 64))
    x = torch.randn(3, 64)
    assert torch.equal(TABLE[OPS.dequantize_nf4.default](packed, scales), OPS.dequantize_nf4(packed, scales))
    assert close(TABLE[OPS.linear_nf4.default](x, packed, scales), OPS.linear_nf4(x, packed, scales))


def test_every_operator_of_a_model_is_in_the_table_and_quantize_is_not() -> None:
    names = {str(overload) for overload in TABLE}
    registered = {
        name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names() if name.startswith("squish::")
    }
    registered = {name if name.endswith(".out") else f"{name}.default" for name in registered}
    assert registered - names == {"squish.quantize_nf4.default", "squish._survey_nf4.default"}


REFUSED: list[tuple[str, Callable[..., Any], type[Exception]]] = [
    ("dtype must be float32, bfloat16 or float16", lambda f: f("dequantize_nf4", dtype=torch.float64), TypeError),
    (r"scales has \w+ columns", lambda f: f("dequantize_nf4", 16), ValueError),
    ("out has shape", lambda f: f("dequantize_nf4", 32, overload="out", out=torch.empty(6, 63)), ValueError),
    (r"x has \w+ columns", lambda f: f("linear_nf4", first=torch.ones(3, 5)), ValueError),
    ("x must be float32", lambda f: f("linear_nf4", first=torch.ones(3, 64).double()), TypeError),
    ("d says 5 columns", lambda f: f("_linear_nf4_grad_x", 32, 5, first=torch.ones(3, 6)), ValueError),
]


@pytest.mark.parametrize("through", ["a call", "make_fx", "symbolic make_fx"])
@pytest.mark.parametrize(("message", "call", "error"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_the_operator_refuses_is_refused(
    message: str, call: Callable[..., Any], error: type[Exception], through: str
) -> None:
    packed, scales = OPS.quantize_nf4(torch.randn(6, 64))

    def decomposed(name: str, *args: Any, first: Tensor | None = None, overload: str = "default", **kwargs: Any) -> Any:
        leading = (packed, scales) if first is None else (first, packed, scales)
        operator = getattr(getattr(OPS, name), overload)
        if through == "a call":
            return TABLE[operator](*leading, *args, **kwargs)
        mode = "symbolic" if through.startswith("symbolic") else "real"
        function = make_fx(
            lambda *tensors: operator(*tensors, *args, **kwargs), TABLE, mode, _allow_non_fake_inputs=True
        )
        return function(*leading)

    with pytest.raises(error, match=message):
        call(decomposed)


def table_before_2_14() -> dict[OpOverload, Callable[..., Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", TorchVersion("2.13.0"))
        return squish_nf4.decompositions()


def test_levels_written_out_are_those_of_the_operator() -> None:
    every_byte, ones = torch.arange(256, dtype=torch.uint8).view(256, 1), torch.ones(256, 1)
    found = table_before_2_14()[OPS.dequantize_nf4.default](every_byte, ones, 2)
    assert torch.equal(bits(found), bits(OPS.dequantize_nf4(every_byte, ones, 2)))


# --- programs ---------------------------------------------------------------------------------------------------------


def exported_llama() -> tuple[nn.Module, ExportedProgram]:
    model = quantized_llama()
    return model, export(model, (some_tokens(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens")},))


@pytest.mark.sweeps
@pytest.mark.parametrize("core", [False, True], ids=["ours alone", "with torch's own"])
def test_an_exported_model_needs_no_operator_of_ours_and_keeps_its_bytes(core: bool) -> None:
    model, program = exported_llama()
    assert operators(program.graph) == {"squish.linear_nf4.default"}
    table = {**torch.export.default_decompositions(), **TABLE} if core else TABLE
    decomposed = program.run_decompositions(table)
    assert operators(decomposed.graph) == set()
    assert decomposed.state_dict["layers.0.mlp.down_proj.weight"].dtype == torch.uint8
    shared_by_all_layers = [(256, 2)] if torch.__version__ >= "2.14" else []
    assert [tuple(constant.shape) for constant in decomposed.constants.values()] == shared_by_all_layers
    for size in [(1, 1), (2, 9), (5, 40)]:
        tokens = some_tokens(*size)
        assert close(decomposed.module()(tokens), model(tokens))


def test_levels_written_out_need_no_constant_in_a_program() -> None:
    model, program = exported_llama()
    decomposed = program.run_decompositions(table_before_2_14())
    assert operators(decomposed.graph) == set()
    assert not decomposed.constants
    tokens = some_tokens(5, 40)
    assert close(decomposed.module()(tokens), model(tokens))


def test_dequantize_with_dynamic_rows() -> None:
    class Decode(nn.Module):
        def forward(self, packed: Tensor, scales: Tensor) -> Tensor:
            return OPS.dequantize_nf4(packed, scales, 3, dtype=torch.bfloat16)

    n = Dim("n")
    program = export(Decode(), odd_weight(10, 12, 3), dynamic_shapes=({0: n}, {0: n})).run_decompositions(TABLE)
    assert operators(program.graph) == set()
    for rows in (0, 1, 333):
        args = odd_weight(rows, 12, 3)
        assert torch.equal(bits(program.module()(*args)), bits(Decode()(*args)))


def test_autocast_inside_of_a_model_stays_in_its_program_and_around_one_it_is_that_of_torch() -> None:
    layer, x = NF4Linear(65, 33, group_size=32), torch.randn(3, 65)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    expected = Inside()(x)
    assert expected.dtype == torch.bfloat16
    assert close(export(Inside(), (x,)).run_decompositions(TABLE).module()(x), expected)
    around = export(layer, (x,)).run_decompositions(TABLE).module()
    with torch.autocast("cpu", torch.bfloat16):
        y = around(x)
    assert y.dtype == torch.float32  # docs/compile-and-export.md says so: the product was rounded, as torch's own
    torch.testing.assert_close(y, expected.float(), rtol=0.05, atol=0.05)
    assert not torch.equal(y, around(x))


def training_step(layer: NF4Linear) -> Callable[..., tuple[Tensor, ...]]:
    def gradients(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y = functional_call(layer, weights, (x,))
        return torch.autograd.grad(y.square().sum(), (x, weights["bias"]))

    return gradients


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_a_training_step(mode: str) -> None:
    layer = NF4Linear(65, 33, group_size=32)
    args: Any = (torch.randn(3, 65, requires_grad=True), {**dict(layer.named_parameters()), "scales": layer.scales})
    step = training_step(layer)
    graph = make_fx(step, tracing_mode=mode)(*args)
    assert operators(graph.graph) == {"squish.linear_nf4.default", "squish._linear_nf4_grad_x.default"}
    decomposed = make_fx(step, decomposition_table=TABLE, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)
    assert operators(decomposed.graph) == set()
    assert not [node for node in decomposed.graph.nodes if "meta" in map(str, node.kwargs.values())]  # of the checks
    for found, expected in zip(decomposed(*args), step(*args), strict=True):
        assert close(found, expected)


def test_make_fx_of_out() -> None:
    def into(packed: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        return OPS.dequantize_nf4.out(packed, scales, 32, out=out)

    packed, scales = odd_weight(6, 64, 32)
    args = (packed, scales, torch.empty(6, 64, dtype=torch.float16))
    graph = make_fx(into, decomposition_table=TABLE)(*args)
    assert operators(graph.graph) == set()
    out = torch.empty(6, 64, dtype=torch.float16)
    graph(packed, scales, out)
    assert torch.equal(bits(out), bits(into(*args)))


def test_the_decompositions_follow_the_device_of_the_weight() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        packed, scales = torch.empty(6, 32, dtype=torch.uint8), torch.empty(6, 2)
        dense = TABLE[OPS.dequantize_nf4.default](packed, scales)
    assert (dense.device.type, dense.shape) == ("cuda", (6, 64))
