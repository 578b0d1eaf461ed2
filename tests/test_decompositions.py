"""The operators in plain torch: the same numbers, in a graph that knows no squish operator, and from there in ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import squish_nf4
from squish_nf4 import NF4Linear
from tests.llama import quantized_llama, some_tokens

OPS = torch.ops.squish
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decomposed(op: Any, *args: Any, **named: Any) -> Any:
    return squish_nf4.decompositions()[op.default](*args, **named)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "group_size"), [(7, 60, 1), (7, 60, 3), (5, 64, 32), (1, 10, 10), (0, 64, 32)])
def test_decoded_weights_are_the_operators_bits(n: int, d: int, group_size: int, dtype: torch.dtype) -> None:
    packed, scales = OPS.quantize_nf4(torch.randn(n, d), group_size)
    if n:
        scales[0, 0] = -3e-42  # subnormal, and negative
    expected = OPS.dequantize_nf4(packed, scales, group_size, dtype=dtype)
    assert torch.equal(decomposed(OPS.dequantize_nf4, packed, scales, group_size, dtype=dtype), expected)


def test_a_group_marked_with_nan_stays_marked() -> None:
    packed, scales = OPS.quantize_nf4(torch.randn(2, 64), 32)
    scales[1, 0] = torch.nan
    assert decomposed(OPS.dequantize_nf4, packed, scales, 32)[1].isnan().tolist() == [True] * 32 + [False] * 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 50], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=["no bias", "float32", "bfloat16"])
def test_linear_and_its_gradient_are_the_operators_numbers(
    d: int, bias: torch.dtype | None, dtype: torch.dtype
) -> None:
    packed, scales = OPS.quantize_nf4(torch.nn.functional.pad(torch.randn(9, d), (0, 64 - d)), 32)
    x, dy = torch.randn(2, 3, d).to(dtype), torch.randn(2, 3, 9).to(dtype)
    b = None if bias is None else torch.randn(9).to(bias)
    near = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(
        decomposed(OPS.linear_nf4, x, packed, scales, b, 32), OPS.linear_nf4(x, packed, scales, b, 32), **near
    )
    torch.testing.assert_close(
        decomposed(OPS._linear_nf4_grad_x, dy, packed, scales, 32, d),
        OPS._linear_nf4_grad_x(dy, packed, scales, 32, d),
        **near,
    )


def test_a_traced_training_step_decomposes_too() -> None:
    layer = NF4Linear(50, 9, group_size=32)
    state = layer.state_dict()  # make_fx takes no subclass of Parameter

    def gradient(x: Tensor) -> Tensor:
        y = functional_call(layer, state, (x,))
        return torch.autograd.grad(y.square().sum(), x)[0]

    x = torch.randn(4, 50, requires_grad=True)
    graph = make_fx(gradient, decomposition_table=squish_nf4.decompositions())(x)
    assert "squish" not in graph.code
    torch.testing.assert_close(graph(x), gradient(x), atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return quantized_llama()


@pytest.fixture(scope="module")
def program(llama: torch.nn.Module) -> ExportedProgram:
    shapes = ({0: Dim("batch"), 1: Dim("tokens")},)
    exported = export(llama, (some_tokens(),), dynamic_shapes=shapes)
    return exported.run_decompositions(squish_nf4.decompositions())


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 17)])
def test_a_llama_decomposes_with_its_dynamic_sizes(
    llama: torch.nn.Module, program: ExportedProgram, batch: int, tokens: int
) -> None:
    assert "squish" not in program.graph_module.code
    x = some_tokens(batch, tokens)
    torch.testing.assert_close(program.module()(x), llama(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_holds_the_packed_bytes_and_decodes_them(
    llama: torch.nn.Module, program: ExportedProgram, tmp_path: Path
) -> None:
    file = str(tmp_path / "llama.onnx")
    torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(file)  # optimized, it would be dense
    stored = {tuple(t.dims) for t in onnx.load(file).graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    layers = [module for module in llama.modules() if isinstance(module, NF4Linear)]
    assert layers
    assert {tuple(layer.weight.shape) for layer in layers} == stored
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, tokens in [(2, 9), (1, 1), (3, 17)]:
        x = some_tokens(batch, tokens)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), llama(x).detach(), atol=1e-5, rtol=1e-5)
