"""NF4Linear kept, moved and loaded: state_dict, files, copies, casts, devices. The bytes come through unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from squish_nf4 import NF4Linear
from squish_nf4.nn.packed_weight import PackedWeight
from tests.support.helpers import require, through_pickle, through_torch_save

SIZES = [(64, 64), (65, 32), (7, 64)]  # in_features, group_size: whole groups, padding, an effective group size


def make(in_features: int = 65, group_size: int = 32, **options: Any) -> NF4Linear:
    return NF4Linear(in_features, 9, group_size=group_size, **options)


def require_same(layer: nn.Module, original: nn.Module) -> None:
    """The same bytes, and a layer that works: computes, and refuses to be filled."""
    assert type(layer) is NF4Linear
    assert type(original) is NF4Linear
    for name, tensor in original.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    assert layer.group_size == original.group_size
    assert layer.dense_dtype == original.dense_dtype
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), original(x))
    assert isinstance(layer.weight, PackedWeight)
    with pytest.raises(RuntimeError, match="packed NF4 bytes"):
        nn.init.zeros_(layer.weight)


# --- copies and files -------------------------------------------------------------------------------------------------


COPIES: dict[str, Callable[[NF4Linear], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "deepcopy of a model": lambda layer: copy.deepcopy(nn.Sequential(layer))[0],
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_copy_is_the_same_layer_with_memory_of_its_own(
    name: str, in_features: int, group_size: int, bias: bool
) -> None:
    layer = make(in_features, group_size, bias=bias).eval()
    again = COPIES[name](layer)
    assert not again.training
    require_same(again, layer)
    assert again.weight.data_ptr() != layer.weight.data_ptr()
    assert again.scales.data_ptr() != layer.scales.data_ptr()


@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_is_strict(in_features: int, group_size: int, assign: bool) -> None:
    layer = make(in_features, group_size)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    again = make(in_features, group_size)
    result = again.load_state_dict(state, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    require_same(again, layer)
    assert (again.weight.data_ptr() == state["weight"].data_ptr()) == assign


@pytest.mark.parametrize("bias", [True, False])
def test_safetensors_round_trip(tmp_path: Path, bias: bool) -> None:
    model = nn.Sequential(make(bias=bias), nn.ReLU(), make(7, bias=bias))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = nn.Sequential(make(bias=bias), nn.ReLU(), make(7, bias=bias))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    require_same(again[0], model[0])
    require_same(again[2], model[2])


def test_torch_save_of_a_state_dict_loads_with_weights_only(tmp_path: Path) -> None:
    layer, again = make(), make()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    require_same(again, layer)


# --- a dense weight is loaded by quantizing it -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("in_features", "group_size"), SIZES)
def test_a_dense_state_is_quantized(in_features: int, group_size: int, assign: bool, dtype: torch.dtype) -> None:
    dense = nn.Linear(in_features, 9).to(dtype)
    layer = make(in_features, group_size)
    layer.load_state_dict(dense.state_dict(), assign=assign)
    expected = NF4Linear.from_linear(nn.Linear(in_features, 9), group_size)
    packed, scales = quantized(dense.weight, layer)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.bias, dense.bias.to(layer.bias.dtype))
    assert isinstance(layer.weight, type(expected.weight))


def quantized(weight: Tensor, layer: NF4Linear) -> tuple[Tensor, Tensor]:
    padded = nn.functional.pad(weight.detach(), (0, 2 * layer.weight.size(1) - layer.in_features))
    return torch.ops.squish.quantize_nf4(padded, layer.group_size)


def test_a_dense_model_state_fills_a_quantized_model_in_place() -> None:
    dense = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 9))
    model = nn.Sequential(NF4Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 9))
    state = dense.state_dict()
    assert model.load_state_dict(state).missing_keys == []
    assert torch.equal(model[0].weight, NF4Linear.from_linear(dense[0]).weight)
    assert state["0.weight"] is not model[0].weight
    assert torch.equal(state["0.weight"], dense[0].weight)  # what was given is not replaced


def test_assigning_a_state_of_another_dtype_changes_what_to_linear_returns() -> None:
    for state in (nn.Linear(65, 9).bfloat16().state_dict(), make(dtype=torch.bfloat16).state_dict()):
        layer = make(device="meta")
        layer.load_state_dict(state, assign=True)
        dense = layer.to_linear()
        assert dense.weight.dtype == dense.bias.dtype == torch.bfloat16


# --- what does not fit is refused, and nothing of it copied ----------------------------------------------------------


def state_of(**changes: Any) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    state.update(changes)
    return {name: tensor for name, tensor in state.items() if tensor is not None}


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "scales beside a dense weight": (
        state_of(weight=torch.zeros(9, 65)),
        "the state holds scales beside a dense torch.float32 weight",
    ),
    "another group size": (
        dict(NF4Linear(65, 9, group_size=16).state_dict()),
        r"packed weight \(9, 40\) and scales \(9, 5\) do not fit; \(9, 48\) and \(9, 3\) are wanted at group_size=32 "
        r"\(the state has group_size=16\)",
    ),
    "another size": (
        dict(NF4Linear(65, 8, group_size=32).state_dict(), bias=torch.zeros(9)),
        r"packed weight \(8, 48\) and scales \(8, 3\) do not fit; \(9, 48\) and \(9, 3\) are wanted",
    ),
    "int8 weight": (
        state_of(weight=torch.zeros(9, 48, dtype=torch.int8)),
        "packed weight must be uint8 and scales float32, got torch.int8 and torch.float32",
    ),
    "bfloat16 scales": (
        state_of(scales=torch.zeros(9, 3, dtype=torch.bfloat16)),
        "packed weight must be uint8 and scales float32, got torch.uint8 and torch.bfloat16",
    ),
    "dense, padded": (
        {"weight": torch.zeros(9, 96), "bias": torch.zeros(9)},
        r"dense weight has shape \(9, 96\), \(9, 65\) is wanted",
    ),
    "dense, transposed": (
        {"weight": torch.zeros(65, 9), "bias": torch.zeros(9)},
        r"dense weight has shape \(65, 9\), \(9, 65\) is wanted",
    ),
    "dense, not finite": (
        {"weight": torch.full((9, 65), float("nan")), "bias": torch.zeros(9)},
        "weight holds nan at row 0, column 0; NF4 encodes finite weights only",
    ),
    "bias of another size": (state_of(bias=torch.zeros(8)), r"bias has shape \(8,\), \(9,\) is wanted"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_a_state_that_does_not_fit_is_refused_by_name_and_not_copied(name: str, assign: bool, strict: bool) -> None:
    state, text = MISFITS[name]
    model = nn.ModuleDict({"encoder": nn.Sequential(make())})
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=rf"NF4Linear 'encoder.0': {text}"):
        model.load_state_dict({f"encoder.0.{key}": value for key, value in state.items()}, strict=strict, assign=assign)
    require_same(model["encoder"][0], before["encoder"][0])


@pytest.mark.parametrize(
    "value", [None, 3, 1.5, "x", [1.0], np.zeros((9, 65), np.float32)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("part", ["weight", "scales", "bias"])
def test_what_is_no_tensor_is_refused_by_key_and_type_and_nothing_is_copied(part: str, value: object) -> None:
    model = nn.Sequential(make())
    before = copy.deepcopy(model)
    state = {f"0.{key}": tensor for key, tensor in make().state_dict().items()} | {f"0.{part}": value}
    text = rf"NF4Linear '0': 0.{part} of the state must be a tensor, got {type(value).__name__}"
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(state)
    require_same(model[0], before[0])


def test_a_bare_layer_is_named_without_a_path() -> None:
    with pytest.raises(RuntimeError, match=r"\tNF4Linear: bias has shape"):
        make().load_state_dict(state_of(bias=torch.zeros(8)))


def test_an_empty_state_is_missing_everything_if_strict_and_nothing_else() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias", "weight", "scales"'):
        layer.load_state_dict({})
    assert layer.load_state_dict({}, strict=False).missing_keys == ["bias", "weight", "scales"]
    require_same(layer, before)


def test_unexpected_keys_are_told_as_torch_tells_them() -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "absmax"'):
        make().load_state_dict(state_of(absmax=torch.zeros(1)))


# --- casts ------------------------------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "to(dtype)": (lambda m: m.to(torch.float16), torch.float16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "to(tensor)": (lambda m: m.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("within", [False, True], ids=["itself", "in a model"])
def test_a_cast_changes_the_bias_alone(name: str, within: bool) -> None:
    cast, dtype = CASTS[name]
    layer = make()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    model = nn.Sequential(layer) if within else layer
    assert cast(model) is model
    assert torch.equal(layer.weight, before["weight"])
    assert torch.equal(layer.scales, before["scales"])
    assert layer.scales.dtype == torch.float32
    assert layer.bias.dtype == dtype
    assert layer(torch.zeros(3, 65, dtype=dtype)).dtype == dtype
    assert layer.to_linear().weight.dtype == dtype
    assert layer.bias.requires_grad
    assert isinstance(layer.weight, PackedWeight)


def test_float64_is_refused_at_the_call_and_loses_nothing() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    layer.double()
    assert torch.equal(layer.weight, before.weight)
    assert layer.scales.dtype == torch.float32
    with pytest.raises(TypeError, match="linear_nf4: x must be float32, bfloat16 or float16, got float64"):
        layer(torch.zeros(3, 65, dtype=torch.float64))
    with pytest.raises(TypeError, match="linear_nf4: bias must be float32, bfloat16 or float16, got float64"):
        layer(torch.zeros(3, 65))
    require_same(layer.float(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32], ids=str)
def test_type_is_refused_because_it_would_cast_the_packed_bytes(dtype: torch.dtype) -> None:
    layer = make()
    before = copy.deepcopy(layer)
    with pytest.raises(
        TypeError, match=rf"NF4Linear: packed bytes cannot be cast to {dtype}; use .to\(dtype\), not .type"
    ):
        nn.Sequential(layer).type(dtype)
    require_same(layer, before)


def test_a_cast_carries_the_gradient_of_the_bias() -> None:
    layer = make()
    layer(torch.randn(3, 65)).sum().backward()
    layer.bfloat16()
    assert layer.bias.grad is not None
    assert layer.bias.grad.dtype == torch.bfloat16
    assert torch.equal(layer.bias.grad, torch.full((9,), 3.0, dtype=torch.bfloat16))


# --- devices and memory ----------------------------------------------------------------------------------------------


def test_to_meta_and_to_empty() -> None:
    layer = make().eval()
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert isinstance(layer.weight, PackedWeight)
    layer.to_empty(device="cpu")
    shapes = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in layer.state_dict().items()}
    assert shapes == {
        "weight": ((9, 48), torch.uint8, "cpu"),
        "scales": ((9, 3), torch.float32, "cpu"),
        "bias": ((9,), torch.float32, "cpu"),
    }
    other = make().eval()
    layer.load_state_dict(other.state_dict())
    require_same(layer, other)


def test_share_memory_shares_bytes_scales_and_bias() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    assert layer.share_memory() is layer
    assert all(t.is_shared() for t in layer.state_dict().values())
    require_same(layer, before)


def test_strided_bytes_and_scales_can_be_moved() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    layer.scales = layer.scales.t().contiguous().t()
    layer.weight = PackedWeight(layer.weight.t().contiguous().t(), False)
    require_same(layer.to(torch.float32), before)


def test_train_and_eval_change_nothing_but_the_flag() -> None:
    layer = make()
    before = copy.deepcopy(layer)
    assert not layer.eval().training
    require_same(layer, before)
    assert layer.train().training


def test_cuda_and_back_is_the_same_layer() -> None:
    require("cuda", torch.cuda.is_available(), "no GPU")
    layer = make()
    before = copy.deepcopy(layer)
    layer.cuda()
    assert {t.device.type for t in layer.state_dict().values()} == {"cuda"}
    require_same(layer.cpu(), before)


def test_swapping_parameters_instead_of_their_data_keeps_the_layer_whole() -> None:
    layer, other = make(), make()
    expected = copy.deepcopy(layer).bfloat16()
    tied = nn.Sequential(layer, make())
    tied[1].weight = held = layer.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        tied.to(torch.bfloat16)
        other.to(torch.bfloat16).load_state_dict(layer.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert held is tied[0].weight is tied[1].weight
    for swapped in (layer, other):
        assert torch.equal(swapped.dequantize(), expected.dequantize())
        assert torch.equal(swapped.bias, expected.bias)
        assert isinstance(swapped.weight, PackedWeight)


# --- a state that comes in parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["weight", "scales"])
@pytest.mark.parametrize("assign", [False, True])
def test_half_a_state_is_taken_and_the_layer_waits_for_the_rest(assign: bool, first: str) -> None:
    whole = make().state_dict()
    other = "scales" if first == "weight" else "weight"
    model = nn.Sequential(make())
    expected = make()
    expected.load_state_dict(whole)
    result = model.load_state_dict({f"0.{first}": whole[first]}, strict=False, assign=assign)
    assert result.missing_keys == ["0.bias", f"0.{other}"]
    for use in (lambda: model(torch.ones(2, 65)), model[0].to_linear, copy.deepcopy(model)[0].dequantize):
        with pytest.raises(RuntimeError, match=f"NF4Linear: a state has brought its {first} and not its {other}"):
            use()
    model.load_state_dict({f"0.{other}": whole[other], "0.bias": whole["bias"]}, strict=False, assign=assign)
    require_same(model[0], expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_half_a_layer_runs_by_no_route() -> None:
    layer, x = make(), torch.ones(2, 65)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    layer.load_state_dict({"weight": make().weight}, strict=False)
    for use, given in ((layer.forward, x), (compiled, x), (torch.jit.script, layer), (torch.fx.symbolic_trace, layer)):
        with pytest.raises(RuntimeError, match="a state has brought its weight and not its scales"):
            use(given)


def test_halves_of_a_wider_layer_are_refused_when_the_second_comes() -> None:
    wide, layer = NF4Linear(128, 4), NF4Linear(100, 4)
    layer.load_state_dict({"weight": wide.weight}, strict=False)
    with pytest.raises(RuntimeError, match="the state holds weights beyond column 100, where this layer's padding is"):
        layer.load_state_dict({"scales": wide.scales}, strict=False)


def test_the_first_half_is_not_judged_by_what_was_there_before() -> None:
    layer, other = NF4Linear(100, 4), NF4Linear(100, 4)
    layer.scales.fill_(float("nan"))  # as to_empty() may leave them
    for half in ("weight", "scales"):
        layer.load_state_dict({half: other.state_dict()[half]}, strict=False)
    assert torch.equal(layer.dequantize(), other.dequantize())


def test_half_a_state_with_strict_names_what_is_missing() -> None:
    model = nn.Sequential(make())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.scales"'):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in state_of(scales=None).items()})
    with pytest.raises(RuntimeError, match="not its scales"):
        model(torch.ones(2, 65))


@pytest.mark.parametrize("misfit", [{"weight": torch.zeros(9, 40, dtype=torch.uint8)}, {"scales": torch.zeros(9, 5)}])
def test_half_a_state_that_does_not_fit_is_refused_and_not_copied(misfit: dict[str, Tensor]) -> None:
    layer = make()
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="do not fit"):
        layer.load_state_dict(misfit, strict=False)
    require_same(layer, before)


def test_a_dense_weight_or_a_reset_ends_the_wait() -> None:
    for end in (
        lambda layer: layer.load_state_dict({"weight": torch.ones(9, 65)}, strict=False),
        lambda layer: layer.reset_parameters(),
    ):
        layer = make()
        layer.load_state_dict({"scales": layer.scales.clone()}, strict=False)
        end(layer)
        assert layer(torch.ones(2, 65)).shape == (2, 9)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_weights_where_the_padding_is_is_refused(assign: bool) -> None:
    wide = NF4Linear(128, 4)
    layer = NF4Linear(100, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert wide.weight.shape == layer.weight.shape
    with pytest.raises(RuntimeError, match="the state holds weights beyond column 100, where this layer's padding is"):
        layer.load_state_dict(wide.state_dict(), assign=assign)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("in_features", [1, 5, 65, 99, 100, 127])
def test_a_padded_layer_loads_its_own_state(in_features: int) -> None:
    saved, layer = NF4Linear(in_features, 4), NF4Linear(in_features, 4)
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer.dequantize(), saved.dequantize())
