"""torch.vmap of the operators: what a loop over the batch gives, wherever the batch stands, and without the warning of
torch's own loop (every warning is an error here)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from squish_nf4 import NF4Linear, quantize_nf4

OPS = torch.ops.squish
BATCH = 5
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(ROUNDING)


def weight(*batch: int) -> tuple[Tensor, Tensor]:
    packed, scales = OPS.quantize_nf4(torch.randn(*batch, 6, 64).view(-1, 64))
    return packed.view(*batch, 6, 32), scales.view(*batch, 6, 2)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def require_a_loop(function: Callable[..., Any], args: tuple[Tensor, ...], dims: tuple[Any, ...]) -> None:
    """Equal up to rounding: a matrix product may sum in another order where it has more rows."""
    entries = [
        [a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)] for i in range(BATCH)
    ]
    expected = torch.stack([function(*entry) for entry in entries])
    close = (
        {} if expected.dtype == torch.uint8 else {"rtol": ROUNDING[expected.dtype], "atol": ROUNDING[expected.dtype]}
    )
    torch.testing.assert_close(vmap(function, in_dims=dims)(*args), expected, **close)
    torch.testing.assert_close(vmap(function, in_dims=dims, out_dims=-1)(*args), expected.movedim(0, -1), **close)


class Calls(TorchDispatchMode):
    """Counts the operators that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.of[name] = self.of.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


# --- one call for a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((BATCH, 64), 0), ((64, BATCH), 1), ((3, BATCH, 61), 1), ((3, 64, BATCH), -1)]
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_batched_activations(shape: tuple[int, ...], dim: int, with_bias: bool, dtype: torch.dtype) -> None:
    packed, scales = weight()
    bias = floats(6) if with_bias else None
    require_a_loop(lambda x: OPS.linear_nf4(x, packed, scales, bias), (floats(*shape, dtype=dtype),), (dim,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((BATCH, 6), 0), ((6, BATCH), 1), ((3, BATCH, 6), 1)])
def test_batched_gradients_of_the_result(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    packed, scales = weight()
    require_a_loop(
        lambda dy: OPS._linear_nf4_grad_x(dy, packed, scales, 32, 61), (floats(*shape, dtype=dtype),), (dim,)
    )


@pytest.mark.parametrize(("shape", "dim"), [((BATCH, 6, 64), 0), ((6, BATCH, 64), 1), ((6, 64, BATCH), -1)])
def test_batched_weights_are_quantized_and_decoded(shape: tuple[int, ...], dim: int) -> None:
    w = floats(*shape)
    for group_size in (16, 32):  # given, and the default
        given = () if group_size == 32 else (group_size,)
        for part in (0, 1):
            require_a_loop(lambda w, part=part, given=given: OPS.quantize_nf4(w, *given)[part], (w,), (dim,))
        packed, scales = vmap(lambda w, given=given: OPS.quantize_nf4(w, *given), in_dims=dim, out_dims=(1, -1))(w)
        for dtype in (None, torch.bfloat16):
            require_a_loop(
                lambda p, s, g=group_size, dtype=dtype: OPS.dequantize_nf4(p, s, g, dtype=dtype),
                (packed, scales),
                (1, -1),
            )


def test_a_batch_of_activations_or_of_weights_is_one_call() -> None:
    packed, scales = weight()
    with Calls() as calls:
        vmap(lambda x: OPS.linear_nf4(x, packed, scales))(floats(BATCH, 64))
        vmap(lambda dy: OPS._linear_nf4_grad_x(dy, packed, scales, 32, 64))(floats(BATCH, 6))
        vmap(lambda w: OPS.dequantize_nf4(*OPS.quantize_nf4(w)))(floats(BATCH, 6, 64))
    ours = {name: count for name, count in calls.of.items() if name.startswith("squish")}
    assert ours == dict.fromkeys(
        [f"squish.{name}.default" for name in ("linear_nf4", "_linear_nf4_grad_x", "quantize_nf4", "dequantize_nf4")], 1
    )


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (2, 0, 64)])
def test_an_empty_batch_of_activations(shape: tuple[int, ...]) -> None:
    packed, scales = weight()
    assert vmap(lambda x: OPS.linear_nf4(x, packed, scales))(floats(*shape)).shape == (*shape[:-1], 6)
    assert vmap(quantize_nf4)(floats(0, 6, 64))[0].shape == (0, 6, 32)


# --- one call for each entry of anything else -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims", [(0, None, None, 0), (None, None, None, 0), (None, 0, 0, None), (0, 0, 0, 0), (0, None, 0, None)]
)
def test_batched_weights_and_biases(dims: tuple[int | None, ...]) -> None:
    packed, scales = weight(BATCH)
    args = [floats(BATCH, 3, 61, dtype=torch.bfloat16), packed, scales, floats(BATCH, 6)]
    args = [a if dim == 0 else a[0] for a, dim in zip(args, dims, strict=True)]
    require_a_loop(OPS.linear_nf4, tuple(args), dims)


@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None)])
def test_batched_weights_in_the_gradient(dims: tuple[int | None, ...]) -> None:
    packed, scales = weight(BATCH)
    args = [a if dim == 0 else a[0] for a, dim in zip((floats(BATCH, 3, 6), packed, scales), dims, strict=True)]
    require_a_loop(lambda dy, p, s: OPS._linear_nf4_grad_x(dy, p, s, 32, 64), tuple(args), dims)


@pytest.mark.parametrize("dims", [(0, None), (None, 0)])
def test_batched_bytes_or_batched_scales_alone(dims: tuple[int | None, ...]) -> None:
    args = [a if dim == 0 else a[0] for a, dim in zip(weight(BATCH), dims, strict=True)]
    require_a_loop(lambda p, s: OPS.dequantize_nf4(p, s, dtype=torch.float16), tuple(args), dims)


def test_no_entries_of_a_bias_are_refused() -> None:
    packed, scales = weight()
    x = floats(64)
    with pytest.raises(ValueError, match="linear_nf4: vmap over an empty batch needs the batch in x alone"):
        vmap(lambda bias: OPS.linear_nf4(x, packed, scales, bias))(floats(0, 6))


@pytest.mark.parametrize("columns", [64, 6])
def test_a_batch_of_scalars_is_not_taken_for_a_row(columns: int) -> None:
    packed, scales = weight()
    with pytest.raises(ValueError, match="linear_nf4: x must have at least one dimension, got a scalar"):
        vmap(lambda x: OPS.linear_nf4(x, packed, scales))(floats(columns))
    with pytest.raises(ValueError, match="_linear_nf4_grad_x: dy must have at least one dimension, got a scalar"):
        vmap(lambda dy: OPS._linear_nf4_grad_x(dy, packed, scales, 32, 64))(floats(columns))
    with pytest.raises(ValueError, match="quantize_nf4: w must be 2-D"):
        vmap(OPS.quantize_nf4)(floats(BATCH, columns))


# --- together with gradients, autocast, compile, and itself -----------------------------------------------------------


def test_nested_batches() -> None:
    packed, scales = weight()
    x, biases = floats(2, BATCH, 3, 64), floats(BATCH, 6)
    y = OPS.linear_nf4(x, packed, scales)
    assert torch.equal(vmap(vmap(lambda x: OPS.linear_nf4(x, packed, scales)))(x), y)
    assert torch.equal(
        vmap(vmap(lambda x: OPS.linear_nf4(x, packed, scales), in_dims=1), in_dims=2)(x),
        y.movedim(2, 0).transpose(1, 2),
    )
    over_both = vmap(lambda x: vmap(lambda bias: OPS.linear_nf4(x, packed, scales, bias))(biases), in_dims=1)(x)
    assert torch.equal(over_both[2, 3], OPS.linear_nf4(x[:, 2], packed, scales, biases[3]))
    between = vmap(
        lambda x: grad(lambda b: vmap(lambda z: (OPS.linear_nf4(x, packed, scales, b) * z).sum())(biases).sum())(
            biases[0]
        )
    )
    assert torch.allclose(between(x[:, 0]), 3 * biases.sum(0).expand(2, 6), rtol=1e-4)


def test_gradients_per_sample() -> None:
    packed, scales = weight()
    x, bias = floats(BATCH, 3, 61), floats(6)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return OPS.linear_nf4(x, packed, scales, bias).sin().sum()

    of_x, of_bias = vmap(grad(loss, (0, 1)), in_dims=(0, None))(x, bias)
    for i in range(BATCH):
        dx, dbias = grad(loss, (0, 1))(x[i], bias)
        assert torch.allclose(of_x[i], dx, rtol=1e-5, atol=1e-5)
        assert torch.allclose(of_bias[i], dbias, rtol=1e-5)
    through_all = grad(lambda x: vmap(loss, in_dims=(0, None))(x, bias).sum())(x)
    assert torch.equal(through_all, of_x)
    second = vmap(grad(lambda x: grad(loss)(x, bias).square().sum()))(x)
    assert torch.allclose(second[1], grad(lambda x: grad(loss)(x, bias).square().sum())(x[1]), rtol=1e-4, atol=1e-3)


def test_a_jacobian_is_the_decoded_weight() -> None:
    packed, scales = weight()
    jacobian = jacrev(lambda x: OPS.linear_nf4(x, packed, scales))(floats(64))
    assert torch.allclose(jacobian, OPS.dequantize_nf4(packed, scales), rtol=1e-6)


def test_an_ensemble_of_layers_by_functional_call() -> None:
    layers = [NF4Linear(65, 9, group_size=32) for _ in range(3)]
    names = [name for name, _ in [*layers[0].named_parameters(), *layers[0].named_buffers()]]
    stacked = {name: torch.stack([layer.state_dict()[name] for layer in layers]) for name in names}
    x = floats(4, 65)
    found = vmap(lambda state: functional_call(layers[0], state, (x,)))(stacked)
    assert torch.equal(found, torch.stack([layer(x) for layer in layers]))


def test_autocast_casts_a_batched_x() -> None:
    packed, scales = weight()
    x = floats(BATCH, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = vmap(lambda x: OPS.linear_nf4(x, packed, scales))(x)
    assert torch.equal(y, OPS.linear_nf4(x.bfloat16(), packed, scales))


def test_vmap_compiles_whole_with_a_dynamic_batch() -> None:
    packed, scales = weight()

    def per_sample(x: Tensor) -> Tensor:
        return vmap(grad(lambda x: OPS.linear_nf4(x, packed, scales).square().sum()))(x)

    torch._dynamo.reset()
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 7):
        x = floats(batch, 3, 64)
        assert torch.equal(compiled(x), per_sample(x))
