"""The weight of packed bytes: handed on as bytes, never taken for numbers. Each case was a wrong number or a riddle."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from squish_nf4 import NF4Linear, quantize_model
from squish_nf4.nn.packed_weight import PackedWeight
from tests.support.processes import run

REFUSED = "packed NF4 bytes"


@pytest.fixture
def layer() -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(64, 32))


X = torch.ones(2, 64)
ARITHMETIC: dict[str, Callable[[Tensor], Any]] = {
    "w * 2": lambda w: w * 2,
    "2 * w": lambda w: 2 * w,
    "w + w": lambda w: w + w,
    "1 - w": lambda w: 1 - w,
    "w / 2": lambda w: w / 2,
    "w // 2": lambda w: w // 2,
    "w ** 2": lambda w: w**2,
    "-w": lambda w: -w,
    "~w": lambda w: ~w,
    "w & 15": lambda w: w & 15,
    "w >> 4": lambda w: w >> 4,
    "w < 3": lambda w: w < 3,
    "w == 0": lambda w: w == 0,
    "eq of floats": lambda w: torch.eq(torch.ones(32, 32), w),
    "is_nonzero": lambda w: w[0, 0].is_nonzero(),
    "copy.copy(w) * 2": lambda w: copy.copy(w) * 2,
    "x @ w": lambda w: torch.ones(2, 32) @ w,
    "w @ x": lambda w: w @ torch.ones(32),
    "abs": torch.abs,
    "sum": torch.sum,
    "mean": torch.mean,
    "norm": torch.linalg.vector_norm,
    "argmax": torch.argmax,
    "F.linear": lambda w: F.linear(torch.ones(2, 32), w),
    "F.embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "einsum": lambda w: torch.einsum("nk,bk->bn", w, torch.ones(2, 32)),
    "x.to(w)": lambda w: X.to(w),
    "x.type_as(w)": lambda w: X.type_as(w),
    "x[w]": lambda w: torch.ones(300)[w],
    "x.copy_(w)": lambda w: torch.ones(32, 32).copy_(w),
    "float": lambda w: w.float(),
    "half": lambda w: w.half(),
    "to(bfloat16)": lambda w: w.to(torch.bfloat16),
    "type": lambda w: w.type(torch.float16),
    "int": lambda w: int(w[0, 0]),
    "cat with floats": lambda w: torch.cat([w, torch.ones(1, 32)]),
    "where": lambda w: torch.where(w == w, w, w),
    "quantize_per_tensor": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.quint8),
}
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "w[3] = 0": lambda w: w.__setitem__(3, 0),
    "w *= 2": lambda w: w.__imul__(2),
    "add_": lambda w: w.add_(1),
    "copy_ of floats": lambda w: w.copy_(torch.zeros(32, 32)),
    "copy_ of floats by name": lambda w: w.copy_(other=torch.zeros(32, 32)),
    "copy_ of a number": lambda w: w.copy_(0),
    "_foreach_copy_ of floats": lambda w: torch._foreach_copy_(self=[w], src=[torch.zeros(32, 32)]),
    "data = floats": lambda w: setattr(w, "data", torch.zeros(32, 32)),
    "data.add_": lambda w: w.data.add_(1),
    "data[0] = 0": lambda w: w.data.__setitem__(0, 0),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "a view": lambda w: w[:4].fill_(0),
    "masked_fill_": lambda w: w.masked_fill_(w == w, 1),
    "clamp_": lambda w: w.clamp_(0, 1),
    "random_": lambda w: w.random_(),
    "out=": lambda w: torch.add(w, w, out=w),
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2),
    "_foreach_lerp_": lambda w: torch._foreach_lerp_([w], [w], 0.5),
    "clip_grad_value_ of weights": lambda w: torch._foreach_clamp_min_([w], 1),
}


@pytest.mark.parametrize("name", [*ARITHMETIC, *WRITES])
def test_arithmetic_is_refused_in_words_of_nf4(layer: NF4Linear, name: str) -> None:
    before = copy.deepcopy(layer)
    for weight in (layer.weight, layer.weight.detach(), layer.state_dict()["weight"], layer.weight.data):
        with pytest.raises(RuntimeError, match=rf"{REFUSED} was given to .*dequantize\(\).*to_linear\(\)"):
            (ARITHMETIC | WRITES)[name](weight)
    assert torch.equal(layer.weight, before.weight)


HANDED_ON: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "data": lambda w: w.data,
    "to(device)": lambda w: w.to("cpu"),
    "to(meta)": lambda w: w.to("meta"),
    "cpu": lambda w: w.cpu(),
    "contiguous": lambda w: w.t().contiguous(),
    "view": lambda w: w.view(-1),
    "a slice": lambda w: w[3:5],
    "a row": lambda w: w[3],
    "chunk": lambda w: w.chunk(2),
    "split": lambda w: torch.split(w, 3),
    "narrow": lambda w: w.narrow(0, 1, 2),
    "cat": lambda w: torch.cat([w, w]),
    "cat by name": lambda w: torch.cat(tensors=[w, w]),
    "clone by name": lambda w: torch.clone(input=w),
    "repeat": lambda w: w.repeat(2, 1),
    "flip": lambda w: w.flip(0),
    "gather": lambda w: w.gather(0, torch.zeros(1, 32, dtype=torch.long)),
    "byte": lambda w: w.byte(),
    "stack": lambda w: torch.stack([w, w]),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "nn.Parameter": lambda w: nn.Parameter(w, requires_grad=False),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_bytes_are_handed_on_and_stay_packed(layer: NF4Linear, name: str) -> None:
    found = HANDED_ON[name](layer.weight)
    expected = HANDED_ON[name](layer.weight.detach().as_subclass(Tensor))
    found, expected = (each if isinstance(each, tuple) else (each,) for each in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert type(one) is PackedWeight
        assert one.is_meta or torch.equal(one, other)
        with pytest.raises(RuntimeError, match=REFUSED):
            one.mul(2)


def test_what_reads_the_weight_gets_an_answer(layer: NF4Linear) -> None:
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type, weight.dim()) == ((32, 32), torch.uint8, "cpu", 2)
    assert not weight.is_floating_point()
    assert weight.grad is None
    assert not weight.requires_grad
    assert torch.equal(weight, weight.clone())
    assert bool((weight == weight).all())
    assert torch.allclose(weight, weight.clone())
    torch.testing.assert_close(layer.state_dict(), copy.deepcopy(layer).state_dict())
    assert bool(weight.isfinite().all())
    assert weight.numpy().shape == (32, 32)
    assert type(torch.empty_like(weight)) is PackedWeight
    assert type(torch.full_like(weight, 0.1, dtype=torch.float32)) is Tensor
    assert torch.numel(input=weight) == 1024
    torch.optim.Adagrad(layer.parameters())  # its state begins with full_like
    assert type(weight.new_zeros(3, dtype=torch.float32)) is Tensor
    assert repr(weight).startswith("Parameter")
    assert {weight: 1}[weight] == 1
    assert torch.empty(32, 32, dtype=torch.uint8).copy_(weight).sum() > 0


def test_operators_take_it_and_an_x_with_a_torch_function_of_its_own(layer: NF4Linear) -> None:
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    dense = torch.ops.squish.dequantize_nf4(layer.weight, layer.scales, layer.group_size)
    torch.testing.assert_close(layer(X), F.linear(X, dense, layer.bias))
    y = layer(X.as_subclass(Watched))
    assert torch.equal(y.as_subclass(Tensor), layer(X))
    assert any("linear_nf4" in str(func) for func in seen)


def test_a_call_does_not_pass_through_the_refusal(layer: NF4Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as a small product."""
    expected = layer(X)

    def refuse(cls: type, func: Any, *given: Any) -> Any:
        raise AssertionError(f"asked for {func}")

    monkeypatch.setattr(PackedWeight, "__torch_function__", classmethod(refuse))
    assert torch.equal(layer(X), expected)


def test_under_fake_tensors_the_weight_is_a_parameter_of_torch() -> None:
    with FakeTensorMode():
        layer = NF4Linear(64, 32)
        assert isinstance(layer.weight, nn.Parameter)
        assert not isinstance(layer.weight, PackedWeight)
        assert layer(torch.ones(2, 64)).shape == (2, 32)


CARRIED_IN_A_GRAPH: dict[str, Callable[[Tensor], Any]] = {
    name: HANDED_ON[name] for name in ("detach", "clone", "to(device)", "view", "a slice", "cat")
} | {"==": lambda w: w == w, "is_floating_point": lambda w: w.is_floating_point()}


@pytest.mark.compiles
@pytest.mark.parametrize("name", CARRIED_IN_A_GRAPH)
def test_what_hands_bytes_on_compiles_whole(layer: NF4Linear, name: str) -> None:
    function = CARRIED_IN_A_GRAPH[name]
    found = torch.compile(function, fullgraph=True, backend="eager")(layer.weight)
    expected = function(layer.weight)
    assert type(found) is type(expected)
    assert found is expected or torch.equal(found, expected)


@pytest.mark.compiles
def test_a_functional_call_with_a_moved_weight_compiles_whole(layer: NF4Linear) -> None:
    def call(x: Tensor) -> Any:
        state = {"weight": layer.weight.to(x.device), "scales": layer.scales, "bias": layer.bias}
        return torch.func.functional_call(layer, state, (x,))

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(X), layer(X))


def test_a_mode_of_torch_functions_sees_the_operator(layer: NF4Linear) -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        y = layer(X)
    assert torch.equal(y, layer(X))
    assert any("linear_nf4" in name for name in seen)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_saved_state_holds_nothing_of_ours(layer: NF4Linear, keep_vars: bool) -> None:
    file = io.BytesIO()
    torch.save(layer.state_dict(keep_vars=keep_vars), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state["weight"]) is nn.Parameter
    assert torch.equal(state["weight"], layer.weight)


def test_a_pickle_keeps_ties_and_the_class(layer: NF4Linear) -> None:
    tied = NF4Linear.from_linear(nn.Linear(64, 32))
    tied.weight, tied.scales = layer.weight, layer.scales
    for copied in (pickle.loads(pickle.dumps(nn.Sequential(layer, tied))), copy.deepcopy(nn.Sequential(layer, tied))):
        assert copied[0].weight is copied[1].weight
        assert type(copied[0].weight) is PackedWeight
        assert not copied[0].weight.requires_grad
        assert torch.equal(copied[0](X), layer(X))


# --- what others do with a layer's weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("average", [torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999), None], ids=["ema", "swa"])
def test_a_running_average_of_a_model_is_refused(layer: NF4Linear, average: Any) -> None:
    """Bytes averaged with themselves 100 times changed by 17 %."""
    model = nn.Sequential(layer, nn.Linear(32, 2))
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    averaged.update_parameters(model)  # the first one copies
    assert torch.equal(averaged.module[0].weight, layer.weight)
    with pytest.raises(RuntimeError, match=rf"{REFUSED}.*averages.*is_floating_point\(\)"):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].weight, layer.weight)


def test_an_average_by_hand_is_refused_and_one_of_what_requires_grad_works(layer: NF4Linear) -> None:
    model = nn.Sequential(layer, nn.Linear(32, 2))
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=REFUSED):
        average["0.weight"].mul_(0.9).add_(model[0].weight, alpha=0.1)
    trained = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            trained[name].mul_(0.9).add_(tensor.detach(), alpha=0.1)
    assert sorted(trained) == ["0.bias", "1.bias", "1.weight"]


def test_folding_a_batch_norm_is_refused(layer: NF4Linear) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.nn.utils.fusion.fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(32).eval())


@pytest.mark.parametrize("prune", ["l1_unstructured", "random_unstructured"])
def test_pruning_is_refused_and_changes_nothing(layer: NF4Linear, prune: str) -> None:
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=REFUSED):
        getattr(torch.nn.utils.prune, prune)(layer, "weight", 0.5)
    assert torch.equal(layer(X), before(X))
    assert type(layer.weight) is PackedWeight


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrizations_are_refused_and_change_nothing(
    layer: NF4Linear, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=REFUSED):
        wrap(layer)
    assert torch.equal(layer(X), before(X))
    assert layer.state_dict().keys() == before.state_dict().keys()


def test_vectors_of_all_parameters_are_refused(layer: NF4Linear) -> None:
    with pytest.raises((RuntimeError, TypeError), match=REFUSED):
        torch.nn.utils.parameters_to_vector(nn.Sequential(nn.Linear(64, 64), layer).parameters())


# --- nested tensors, FLOPs --------------------------------------------------------------------------------------------


def test_a_jagged_batch_is_multiplied_as_by_nn_linear(layer: NF4Linear) -> None:
    parts = [torch.randn(3, 64), torch.randn(5, 64)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = layer(x)
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))
    expected = layer.to_linear()(x)
    torch.testing.assert_close(y.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))  # as wide: the longest is known
    y.values().sum().backward()
    assert x.grad is not None
    assert x.grad.is_nested


def test_a_jagged_batch_that_was_turned_is_refused(layer: NF4Linear) -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 8, 64), torch.randn(5, 8, 64)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(
        ValueError, match="NF4Linear: dimension 2 of the jagged x is the ragged one; dimension 1 is wanted"
    ):
        layer(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_nested_tensor_of_the_older_layout_is_refused(layer: NF4Linear, requires_grad: bool) -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 64)], requires_grad=requires_grad)
    with pytest.raises(NotImplementedError, match=r"linear_nf4: x is a nested tensor of layout torch.strided.*jagged"):
        layer(x)


def test_flops_are_those_of_a_dense_layer(layer: NF4Linear) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: nn.Module) -> int:
        x = torch.randn(5, 7, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return int(counter.get_total_flops())

    dense = layer.to_linear().requires_grad_(False)
    assert count(layer) == count(dense) == 2 * 2 * 35 * 32 * 64
    quantized = nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 3)).requires_grad_(False)
    expected = count(quantized)
    quantize_model(quantized)
    assert count(quantized) == expected  # padding is not counted


@pytest.mark.sweeps
@pytest.mark.parametrize("looked_for", [False, True])
@pytest.mark.parametrize("imports", ["squish_nf4, torch.utils.flop_counter", "torch.utils.flop_counter, squish_nf4"])
def test_flops_are_counted_in_whatever_order_is_imported(imports: str, looked_for: bool) -> None:
    first, second = imports.split(", ")
    look = 'importlib.util.find_spec("torch.utils.flop_counter")' if looked_for else ""
    code = f"""
import importlib.util, {first}
{look}
import {second}, sys, torch
layer = squish_nf4.NF4Linear(64, 32)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    layer(torch.ones(5, 64))
print(counter.get_total_flops(), [finder for finder in sys.meta_path if "flops" in str(finder)])
"""
    done = run([sys.executable, "-c", code])
    assert done.stdout == "20480 []\n", done.stderr
