"""NF4Linear as a layer: what it computes, how it is made, and that it is nn.Linear wherever a user looks."""

from __future__ import annotations

from math import lcm

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squish_nf4 import NF4Linear, linear_nf4, quantize_nf4
from tests.support import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decoded(layer: NF4Linear) -> Tensor:
    """The weight by the definition: (out_features, in_features) float32."""
    dense = reference.dequantize(layer.weight.detach().numpy(), layer.scales.numpy(), layer.group_size)
    return torch.from_numpy(dense[:, : layer.in_features].copy())


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_features", [1, 2, 7, 10, 63, 64, 65, 127, 129, 384])
@pytest.mark.parametrize("group_size", [1, 3, 32, 64, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_of_its_decoded_weight(in_features: int, group_size: int, bias: bool) -> None:
    layer = NF4Linear(in_features, 9, bias, group_size=group_size)
    for m in (3, 40):
        x = torch.randn(m, in_features)
        with torch.no_grad():
            exact = F.linear(x.double(), decoded(layer).double(), layer.bias.double() if bias else None)
            assert float((layer(x).double() - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64), (2, 0, 3, 64)], ids=str)
def test_leading_dimensions_and_the_dtype_of_x_are_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = NF4Linear(64, 9)
    y = layer(torch.randn(shape).to(dtype))
    assert y.shape == (*shape[:-1], 9)
    assert y.dtype == dtype


def test_autocast_computes_in_its_dtype_with_a_float32_bias() -> None:
    layer, x = NF4Linear(64, 9), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.bias.dtype == layer.scales.dtype == torch.float32
    assert torch.equal(y, linear_nf4(x.bfloat16(), layer.weight, layer.scales, layer.bias, 64))


@pytest.mark.parametrize("columns", [60, 63, 65, 128])
def test_an_x_of_another_width_is_refused_also_where_the_operator_would_take_it_for_padding(columns: int) -> None:
    with pytest.raises(ValueError, match=rf"^NF4Linear: x has {columns} columns, but in_features is 64$"):
        NF4Linear(64, 9)(torch.randn(3, columns))


def test_the_first_parameter_of_a_layer_has_a_dtype_to_compute_in() -> None:
    """Models cast what they are given to it; before a norm in float32, bytes would be off by a factor and no error."""
    block = nn.Sequential(NF4Linear(64, 64), nn.LayerNorm(64))
    x = torch.randn(3, 64)
    assert torch.equal(block(x.to(next(block.parameters()).dtype)), block(x))


def test_casting_x_to_the_dtype_of_packed_bytes_is_refused_and_named() -> None:
    model = nn.Sequential(NF4Linear(64, 9, bias=False))
    x = torch.randn(3, 64)
    with pytest.raises(TypeError, match=r"got uint8; if x was cast with x.to\(next\(model.parameters\(\)\).dtype\)"):
        model(x.to(next(model.parameters()).dtype))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_features", [1, 2, 3, 7, 10, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 32, 64, 100])
def test_packed_columns_are_the_next_multiple_of_two_and_the_group(in_features: int, group_size: int) -> None:
    layer = NF4Linear(in_features, 5, group_size=group_size)
    g = layer.group_size
    columns = next(c for c in range(in_features, 1000) if c % lcm(2, g) == 0)
    assert layer.weight.shape == (5, columns // 2)
    assert layer.scales.shape == (5, columns // g)
    assert (layer.in_features, layer.out_features) == (in_features, 5)
    assert g == group_size or in_features < group_size
    if in_features < group_size:  # the size that pads least, the largest of them on a tie
        padding = {size: -in_features % lcm(2, size) for size in range(1, group_size + 1)}
        assert g == max(size for size, pads in padding.items() if pads == min(padding.values()))


def test_padding_decodes_to_zero_and_to_linear_drops_it() -> None:
    layer = NF4Linear(65, 5, group_size=32)
    dense = torch.ops.squish.dequantize_nf4(layer.weight, layer.scales, 32)
    assert dense.shape == (5, 96)
    assert not bool(dense[:, 65:].any())
    assert layer.dequantize().shape == layer.to_linear().weight.shape == (5, 65)


def test_sizes_of_zero() -> None:
    with pytest.warns(UserWarning, match="zero-element tensors"):  # the initializer's, as for nn.Linear(0, 5)
        layer = NF4Linear(0, 5)
    assert torch.equal(layer(torch.ones(3, 0)), layer.bias.expand(3, 5))
    assert layer.bits_per_weight == 0
    assert "bits_per_weight=0.00" in repr(layer)
    assert layer.to(torch.bfloat16).scales.shape == (5, 0)
    with pytest.warns(UserWarning, match="zero-element tensors"):
        assert NF4Linear(64, 0)(torch.ones(3, 64)).shape == (3, 0)


@pytest.mark.parametrize(("sizes", "group_size"), [((-1, 5), 64), ((5, -1), 64), ((5, 5), 0), ((5, 5), -64)])
def test_negative_sizes_and_group_sizes_below_one_are_refused(sizes: tuple[int, int], group_size: int) -> None:
    with pytest.raises(
        ValueError, match=r"^NF4Linear: in_features and out_features must not be negative and group_size"
    ):
        NF4Linear(*sizes, group_size=group_size)


# --- making one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [65, 128])
def test_a_new_layer_has_the_random_numbers_of_nn_linear(in_features: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(5)
    dense = nn.Linear(in_features, 9, bias, dtype=dtype)
    after = torch.rand(1)
    torch.manual_seed(5)
    layer = NF4Linear(in_features, 9, bias, dtype=dtype)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(5)
    layer_again = NF4Linear(in_features, 9, bias, dtype=dtype, device="meta").to_empty(device="cpu")
    layer_again.reset_parameters()
    for made in (layer, layer_again):
        same = NF4Linear.from_linear(dense)
        assert torch.equal(made.weight, same.weight)
        assert torch.equal(made.scales, same.scales)
        assert (made.bias is None) if not bias else torch.equal(made.bias, dense.bias)


def test_default_dtype_and_default_device_are_followed() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert NF4Linear(64, 9).bias.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        layer = NF4Linear(64, 9)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8], ids=str)
def test_a_dtype_that_is_not_computed_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^NF4Linear: dtype must be float32, bfloat16 or float16, got {dtype}$"):
        NF4Linear(64, 9, dtype=dtype)


def test_a_meta_layer_computes_shapes() -> None:
    layer = NF4Linear(65, 9, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.shape, layer.scales.shape) == ((9, 64), (9, 2))
    y = layer(torch.empty(2, 3, 65, device="meta", dtype=torch.float16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 9), torch.float16, "meta")
    layer.reset_parameters()  # nothing to initialize yet


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [7, 64, 65])
def test_from_linear_quantizes_and_leaves_the_original_alone(in_features: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(in_features, 9, dtype=dtype)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = NF4Linear.from_linear(linear)
    padded = F.pad(weight, (0, 2 * layer.weight.size(1) - in_features))
    packed, scales = quantize_nf4(padded, layer.group_size)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.bias, bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert torch.equal(linear.weight, weight)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_from_and_to_linear_take_over_training_and_the_gradient_flag_of_bias(
    training: bool, requires_grad: bool
) -> None:
    linear = nn.Linear(64, 9).train(training)
    linear.bias.requires_grad_(requires_grad)
    layer = NF4Linear.from_linear(linear)
    for module in (layer, layer.to_linear()):
        assert module.training == training
        assert module.bias.requires_grad == requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_linear_computes_what_the_layer_computes(dtype: torch.dtype) -> None:
    layer = NF4Linear.from_linear(nn.Linear(65, 9, dtype=dtype), 32)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, decoded(layer).to(dtype))
    assert linear.weight.is_contiguous()
    assert linear.weight.requires_grad
    x = torch.randn(3, 65, dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(linear(x), layer(x), rtol=tolerance, atol=tolerance)
    # quantizing what was decoded changes nothing: the largest value of a group is its scale
    if dtype == torch.float32:
        again = NF4Linear.from_linear(linear, 32)
        assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_dequantize_gives_the_logical_weight(dtype: torch.dtype | None) -> None:
    layer = NF4Linear(65, 9, group_size=32)
    dense = layer.dequantize(dtype)
    assert dense.shape == (9, 65)
    assert dense.is_contiguous()
    assert torch.equal(dense, decoded(layer).to(dtype or torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_linear_refuses_a_non_finite_weight_and_says_where(value: float) -> None:
    linear = nn.Linear(65, 9)
    with torch.no_grad():
        linear.weight[3, 64] = value
    with pytest.raises(ValueError, match=rf"^NF4Linear.from_linear: weight holds {value} at row 3, column 64;"):
        NF4Linear.from_linear(linear)


def test_from_linear_refuses_what_is_not_a_dense_linear() -> None:
    for module, found in (
        (nn.Conv1d(2, 2, 1), "Conv1d"),
        (NF4Linear(64, 9), "NF4Linear"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
    ):
        with pytest.raises(TypeError, match=rf"^NF4Linear.from_linear: a dense nn.Linear is wanted, got {found}$"):
            NF4Linear.from_linear(module)
    with pytest.raises(
        TypeError, match=r"weight must be float32, bfloat16 or float16, got torch.float64; cast it first"
    ):
        NF4Linear.from_linear(nn.Linear(64, 9).double())
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        NF4Linear.from_linear(nn.Linear(64, 9), 0)


def test_reset_parameters_again_draws_new_numbers_in_place() -> None:
    layer = NF4Linear(65, 9)
    before, addresses = layer.dequantize(), [t.data_ptr() for t in layer.state_dict().values()]
    layer.reset_parameters()
    assert not torch.equal(layer.dequantize(), before)
    assert [t.data_ptr() for t in layer.state_dict().values()] == addresses
    bound = 1 / 65**0.5
    assert float(layer.dequantize().abs().max()) <= bound
    assert float(layer.bias.detach().abs().max()) <= bound


# --- what a user looks at ---------------------------------------------------------------------------------------------


def test_repr_says_sizes_group_bits_and_bytes() -> None:
    assert repr(NF4Linear(384, 1536, group_size=64)) == (
        "NF4Linear(in_features=384, out_features=1536, bias=True, group_size=64, bits_per_weight=4.50, bytes=331776)"
    )
    # 10 columns are fewer than 64: the effective group size, not the one asked for
    assert repr(NF4Linear(10, 7, bias=False)) == (
        "NF4Linear(in_features=10, out_features=7, bias=False, group_size=10, bits_per_weight=7.20, bytes=63)"
    )


def test_bits_per_weight_counts_the_bytes_that_are_stored() -> None:
    for in_features, group_size in [(64, 64), (65, 64), (384, 16), (7, 3), (1, 1)]:
        layer = NF4Linear(in_features, 9, group_size=group_size)
        stored = layer.weight.nbytes + layer.scales.nbytes
        assert layer.bits_per_weight == 8 * stored / (9 * in_features)


def test_it_is_an_nn_linear_with_bytes_for_a_weight() -> None:
    layer = NF4Linear(64, 9)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is layer._parameters["weight"]  # not a property that computes: adapters would merge into a copy
    assert "weight" not in vars(NF4Linear)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.dtype == torch.uint8
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    assert [name for name, _ in layer.named_buffers()] == ["scales"]
    assert list(layer.state_dict()) == ["bias", "weight", "scales"]
    assert NF4Linear(64, 9, bias=False).bias is None


def test_positional_arguments_are_those_of_nn_linear() -> None:
    assert NF4Linear(64, 9, False).bias is None
    with pytest.raises(TypeError, match="positional"):
        NF4Linear(64, 9, True, 64)


# --- gradients and optimizers -----------------------------------------------------------------------------------------


def test_requires_grad_touches_the_bias_alone_and_warns() -> None:
    layer = NF4Linear(64, 9)
    model = nn.Sequential(layer, nn.Linear(9, 2))
    for module in (layer, model):
        assert module.requires_grad_(False) is module
        assert not layer.bias.requires_grad
        with pytest.warns(UserWarning, match=r"NF4 weights are not trained.*adapters.*to_linear\(\)"):
            assert module.requires_grad_(True) is module
        assert layer.bias.requires_grad
        assert not layer.weight.requires_grad
        assert not layer.scales.requires_grad
    with pytest.warns(UserWarning, match="NF4 weights are not trained"):
        layer.weight.requires_grad = True
    assert not layer.weight.requires_grad
    for make in (nn.Parameter, type(layer.weight)):
        with pytest.warns(UserWarning, match="NF4 weights are not trained") as caught:
            assert not make(layer.weight, requires_grad=True).requires_grad
        assert make is nn.Parameter or caught[0].filename == __file__


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_train_what_requires_grad(optimizer: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), NF4Linear(64, 9))
    packed, bias = model[1].weight.clone(), model[1].bias.detach().clone()
    first = model[0].weight.detach().clone()
    trained = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        trained.zero_grad()
        model(torch.ones(3, 64)).square().sum().backward()
        trained.step()
    assert torch.equal(model[1].weight, packed)
    assert not torch.equal(model[1].bias, bias)
    assert not torch.equal(model[0].weight, first)  # its gradient came through the packed layer


def test_clipping_and_zeroing_gradients_pass_over_the_packed_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), NF4Linear(64, 9))
    model(torch.ones(3, 64)).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) > 0
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_quantized_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        layer = NF4Linear.from_linear(nn.Linear(65, 9))
        dense = layer.to_linear()
    assert not any(t.is_inference() for t in layer.state_dict().values())
    for module in (layer, dense):
        x = torch.randn(3, 65, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert module.bias.grad is not None


# --- values written into the bytes ------------------------------------------------------------------------------------

INITIALIZERS = {
    "zeros_": nn.init.zeros_,
    "ones_": nn.init.ones_,
    "constant_": lambda w: nn.init.constant_(w, 0.5),
    "uniform_": nn.init.uniform_,
    "normal_": nn.init.normal_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "sparse_": lambda w: nn.init.sparse_(w, 0.5),
    "trunc_normal_": nn.init.trunc_normal_,
    "orthogonal_": nn.init.orthogonal_,
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers_of_dense_weights_are_refused(name: str) -> None:
    layer = NF4Linear(64, 9)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="packed NF4 bytes"):
        INITIALIZERS[name](layer.weight)
    assert torch.equal(layer.weight, before)


def test_the_initialization_of_a_whole_model_is_refused_at_the_packed_layer() -> None:
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)

    model = nn.Sequential(nn.Linear(64, 64), NF4Linear(64, 9))
    before = model[1].weight.clone()
    with pytest.raises(RuntimeError, match="packed NF4 bytes"):
        model.apply(initialize)
    assert torch.equal(model[1].weight, before)


def test_the_rest_of_nn_linear_is_there() -> None:
    layer = NF4Linear(64, 9)
    x = torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    shifted = torch.func.functional_call(layer, {"bias": layer.bias.detach() + 1}, (x,))
    torch.testing.assert_close(shifted, y + 1)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    layer(x)
    handle.remove()
    assert seen == [(3, 9)]
