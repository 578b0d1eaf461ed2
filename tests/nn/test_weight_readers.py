"""Layers whose weight somebody else reads stay dense: hand-written modules in which it is read in every usual way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squish_nf4 import NF4Linear, dequantize_model, quantize_model
from tests.support.helpers import names, reasons


class Reads(nn.Module):
    """self.proj and its neighbours, read by the forward of a subclass; self.free is called as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other, self.free = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.named = nn.ModuleDict({"a": nn.Linear(64, 64)})
        self.inner = nn.ModuleDict({"proj": nn.Linear(64, 64)})
        self.config = SimpleNamespace(parts=1, exact=False, clip=None)
        self.slow = False


class Product(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return (self.proj.weight @ self.free(x).T).T


class Functional(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.proj.weight, self.proj.bias)


class Slice(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[:, :32], self.proj.weight[:, :32]) + self.free(x)


class View(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,hed->bhe", self.free(x), self.proj.weight.view(4, 16, 64)).flatten(1)


class Chunk(Reads):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.proj.weight.chunk(2)
        return torch.cat([F.linear(x, first), F.linear(x, second)], dim=-1) + self.free(x)


class Local(Reads):
    def forward(self, x: Tensor) -> Tensor:
        layer, unused = self.proj, self.other
        return F.linear(self.free(x), layer.weight) + unused(x)


class Got(Reads):
    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.proj, "weight", None)
        return F.linear(self.free(x), weight) if weight is not None else x


class Cast(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(self.proj.weight.dtype))


class Columns(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).reshape(-1, self.proj.weight.shape[1]))


class First(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(next(self.proj.parameters()).dtype))


class FirstNamed(Reads):
    def forward(self, x: Tensor) -> Tensor:
        p = next(self.proj.parameters())
        return self.proj(self.free(x).to(device=p.device, dtype=p.dtype))


class FirstOfAll(Reads):
    def forward(self, x: Tensor) -> Tensor:
        p = next(self.parameters())
        return self.proj(self.free(x).to(p.dtype))


class FirstOfAnIterator(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(next(iter(self.proj.parameters())).dtype))


class FirstOfAGenerator(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(next(p for p in self.proj.parameters()).dtype))


class FirstOfAList(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(list(self.proj.parameters())[0].dtype))  # noqa: RUF015


class FirstOfPairs(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(next(self.proj.named_parameters())[1].dtype))


class FirstAsAnExample(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(next(self.proj.parameters())))


class PositionalOnly(Reads):
    def forward(self, x: Tensor, /) -> Tensor:
        return self.proj(self.free(x).to(self.proj.weight.dtype))


class OtherBytes(Reads):
    """torch.uint8 is named, but no dtype of the weight is compared with it."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(torch.uint8)
        if mask.dtype == torch.uint8:
            x = self.free(x).to(self.proj.weight.dtype)
        return self.proj(x) * mask


class Compared(Reads):
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.proj.weight.dtype == torch.float32 else torch.bfloat16
        return self.proj(self.free(x).to(dtype))


class Unpacked(Reads):
    def forward(self, x: Tensor) -> Tensor:
        _rows, columns = self.proj.weight.shape
        return self.proj(self.free(x)) / columns


class NamedShape(Reads):
    def forward(self, x: Tensor) -> Tensor:
        shape = self.proj.weight.shape
        return self.proj(self.free(x)) / shape[1]


class SizeOne(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x)) / self.proj.weight.size(1)


class SizeByName(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x)) / self.proj.weight.size(dim=1)


class CommentAtTheMargin(Reads):
    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        """Text
at the margin."""
    # and a comment
        return self.proj(self.free(x).to(self.proj.weight.dtype))
    # fmt: on


class ByName(Cast):
    """The overriding method calls the overridden one by the name of its class."""

    def forward(self, x: Tensor) -> Tensor:
        return Cast.forward(self, x)


class NameLikeOtherWork(Reads):
    def fuse_in(self, x: Tensor) -> Tensor:
        return x.to(self.proj.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fuse_in(self.free(x)))


class Cached(Reads):
    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.proj.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(self.dtype))


def without_wraps(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def around(self: Any, x: Tensor) -> Tensor:
        return function(self, x)

    return around


def with_wraps(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    @functools.wraps(function)
    def around(self: Any, x: Tensor, inner: Callable[[Any, Tensor], Tensor] = function) -> Tensor:
        return inner(self, x)

    return around


class Decorated(Reads):
    @without_wraps
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(self.proj.weight.dtype))


class Wrapped(Reads):
    @with_wraps
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.free(x).to(self.proj.weight.dtype))


class Lambda(Reads):
    cast = lambda self, x: x.to(self.proj.weight.dtype)  # noqa: E731

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.cast(self.free(x)))


class Patched(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.forward = MethodType(Cast.forward, self)


class SetLater(Reads):
    """What a method sets is no setting."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = False

    def be_fast(self) -> None:
        self.fast = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            return F.linear(self.free(x), self.proj.weight)
        return self.proj(self.free(x))


class AttributeThatIsNoModule(Reads):
    def __init__(self) -> None:
        super().__init__()
        vars(self)["hidden"] = self.proj
        self.held = {"both": [self.proj, self.other]}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.held["both"][1].weight) + F.linear(x, self.hidden.weight)


class BoundLists(Reads):
    def forward(self, x: Tensor) -> Tensor:
        pair, (first, second) = [self.proj, self.other], self.layers
        for layer in pair:
            x = F.linear(x, layer.weight)
        return F.linear(self.free(x), first.weight + second.weight)


class SliceOfLayers(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.layers[1:][0].weight)


class EveryModule(Reads):
    def forward(self, x: Tensor) -> Tensor:
        for _, module in self.named.named_modules():
            if isinstance(module, nn.Linear):
                x = F.linear(x, module.weight)
        return self.free(x)


class ByPath(Reads):
    def forward(self, x: Tensor) -> Tensor:
        layer, other = self.get_submodule("inner.proj"), self._modules["proj"]
        return F.linear(self.free(x), layer.weight) + F.linear(x, other._parameters["weight"])


class ByPathToTheWeight(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.get_parameter("inner.proj.weight"))


class PropertyOfALayer(Reads):
    @property
    def layer(self) -> nn.Linear:
        return self.proj

    def get_other(self) -> nn.Linear:
        return self.other

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.layer.weight) + F.linear(x, self.get_other().weight)


class GotByAName(Reads):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("weight", "bias"):
            x = x + getattr(self.proj, name).sum()
        return self.free(x)


class OnlyInTraining(Reads):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.proj.weight.data.clamp_(-0.1, 0.1)
        return self.proj(self.free(x))


class OtherMethod(Reads):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.free(x))


class Inherited(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Property(Reads):
    @property
    def kernel(self) -> Tensor:
        return self.proj.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.free(x) @ self.kernel


class Wrapper(nn.Module):
    """As adapters are: it hands the weight of its layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)

    @property
    def weight(self) -> Tensor:
        return self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ThroughWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped, self.free = Wrapper(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.wrapped.weight)


class Index(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.free(x), self.layers[1].weight)


class Loop(Reads):
    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, _) in enumerate(zip(self.layers, "ab", strict=True)):
            x = F.linear(x, layer.weight) if i else layer(x)
        for layer in self.layers:
            x = F.linear(x, layer.weight)
        return self.free(x)


class Items(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return sum((F.linear(x, layer.weight) for _, layer in self.named.items()), self.free(x))


class Inner(Reads):
    def forward(self, x: Tensor) -> Tensor:
        parent = self.inner
        return F.linear(self.free(x), parent["proj"].weight) + F.linear(x, self.inner.proj.weight)


READERS: list[tuple[type[nn.Module], list[str]]] = [
    *((kind, ["proj"]) for kind in (Product, Functional, Slice, View, Chunk, Local, Got, Cast, Columns, First)),
    *((kind, ["proj"]) for kind in (FirstNamed, FirstOfAnIterator, FirstOfAGenerator, FirstOfAList, FirstOfPairs)),
    *((kind, ["proj"]) for kind in (FirstAsAnExample, PositionalOnly, OtherBytes, Compared, Unpacked, NamedShape)),
    *((kind, ["proj"]) for kind in (SizeOne, SizeByName, CommentAtTheMargin, ByName, NameLikeOtherWork, Cached)),
    *((kind, ["proj"]) for kind in (Decorated, Wrapped, Lambda, Patched, SetLater, FirstOfAll, GotByAName)),
    *((BoundLists, ["layers.0", "layers.1", "other", "proj"]), (SliceOfLayers, ["layers.0", "layers.1"])),
    *((EveryModule, ["named.a"]), (ByPath, ["inner.proj", "proj"]), (PropertyOfALayer, ["other", "proj"])),
    (ByPathToTheWeight, ["inner.proj"]),
    (AttributeThatIsNoModule, ["other", "proj"]),
    *((kind, ["proj"]) for kind in (OnlyInTraining, OtherMethod, Inherited, Property)),
    *((ThroughWrapper, ["wrapped.proj"]), (Index, ["layers.1"]), (Loop, ["layers.0", "layers.1"])),
    *((Items, ["named.a"]), (Inner, ["inner.proj"])),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "read"), READERS, ids=[kind.__name__ for kind, _ in READERS])
def test_a_layer_whose_weight_is_read_stays_dense_and_the_model_works(
    kind: type[nn.Module], read: list[str], dtype: torch.dtype
) -> None:
    model = nn.Sequential(kind().to(dtype))
    report = quantize_model(model, only="*")
    found = {name: reason for name, reason in reasons(report).items() if "reads its weight itself" in reason}
    assert sorted(found) == [f"0.{name}" for name in read]
    assert all("reads its weight itself (test_weight_readers.py:" in reason for reason in found.values())
    assert isinstance(model[0].free, NF4Linear)
    twin = copy.deepcopy(model)
    dequantize_model(twin)
    x = torch.randn(3, 64, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(x), twin(x), rtol=tolerance, atol=tolerance)


def test_the_report_says_who_reads_and_where() -> None:
    reason = reasons(quantize_model(nn.Sequential(Product())))["0.proj"]
    line = Product.forward.__code__.co_firstlineno + 1
    assert reason == f"Product reads its weight itself (test_weight_readers.py:{line})"


def test_only_does_not_quantize_a_layer_that_is_read_nor_is_it_advised() -> None:
    model = nn.Sequential(Cast())
    model._keep_in_fp32_modules = ["proj"]
    for only in (None, "proj"):
        reason = reasons(quantize_model(model, only=only))["0.proj"]
        assert reason.startswith("Cast reads its weight itself")


# --- what does no harm ------------------------------------------------------------------------------------------------


class Harmless(Reads):
    def _init_weights(self) -> None:
        nn.init.ones_(self.proj.weight)

    def reset_parameters(self) -> None:
        self.proj.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.device))


class Asks(Reads):
    def forward(self, x: Tensor) -> Tensor:
        assert self.proj.weight is not None
        assert isinstance(self.proj.weight, Tensor)
        assert torch.is_tensor(self.proj.weight)
        assert self.proj.weight.ndim == self.proj.weight.dim() == 2
        assert len(self.proj.weight.shape) == len(self.proj.weight.size()) == 2
        rows, _ = self.proj.weight.shape
        if self.proj.weight.data_ptr():
            x = x.to(self.proj.weight.device)
        x = self.proj(x).reshape(-1, self.proj.weight.shape[0], self.proj.weight.size(0) // rows)
        return x.reshape(-1, *self.proj.weight.shape[:1]).reshape(-1, self.proj.weight.shape[-2])


class Named(Reads):
    """The same of a weight that has a name."""

    def forward(self, x: Tensor) -> Tensor:
        weight, first = self.proj.weight, next(self.proj.parameters())
        assert weight is not None
        return self.proj(x.to(weight.device).to(device=first.device)).view(-1, weight.size(dim=0))

    def count(self) -> int:
        return self.proj.weight.numel() + sum(p.numel() for p in self.parameters() if p.requires_grad)


class KnowsBytes(Reads):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        if self.proj.weight.dtype != torch.uint8:
            x = x.to(self.proj.weight.dtype)
        if x.dtype != weight.dtype and weight.dtype not in (torch.int8, torch.uint8):
            x = x.to(weight.dtype)
        return self.proj(x.to(weight.dtype if weight.is_floating_point() else x.dtype))


class FirstFloating(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(next(p.dtype for p in self.parameters() if p.is_floating_point())))


class Bias(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) - self.proj.bias + self.other.in_features


class Overridden(Product):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = Wrapper()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("kind", [Harmless, Asks, Named, KnowsBytes, FirstFloating, Bias, Overridden, HandsOn])
def test_what_is_right_for_packed_bytes_keeps_nothing_dense(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    report = quantize_model(model)
    assert reasons(report) == {}
    model(torch.randn(3, 64))


# --- branches ---------------------------------------------------------------------------------------------------------


class Branches(Reads):
    """Reads self.proj if it is set up so, in one of many ways to write that."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.parts > 1 and self.slow:
            return F.linear(x, self.proj.weight)
        return self.proj(x)


class Early(Reads):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.parts == 1 or not self.slow:
            return self.proj(x)
        return F.linear(x, self.proj.weight)


class Expression(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight) if self.config.parts != 1 and self.slow else self.proj(x)


class ShortCircuit(Reads):
    def forward(self, x: Tensor) -> Tensor:
        y = self.slow and self.config.parts > 1 and F.linear(x, self.proj.weight)
        return self.proj(x) if y is False else y


class Otherwise(Reads):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.parts in (0, 1):
            y = self.proj(x)
        elif not self.slow:
            y = self.proj(x).relu()
        else:
            y = F.linear(x, self.proj.weight)
        return y


@pytest.mark.parametrize("kind", [Branches, Early, Expression, ShortCircuit, Otherwise])
def test_a_branch_counts_if_this_module_takes_it(kind: Callable[[], Any]) -> None:
    off, on = kind(), kind()
    on.config.parts, on.slow = 2, True
    model = nn.ModuleList([off, on])
    found = reasons(quantize_model(model))
    assert list(found) == ["1.proj"]
    for module in model:
        module(torch.randn(3, 64))


class Unknown(Reads):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and (self.config.nowhere or len(x) > 5):
            return F.linear(x, self.proj.weight)
        return self.proj(x)


def test_a_branch_that_nobody_can_judge_counts() -> None:
    assert list(reasons(quantize_model(nn.Sequential(Unknown())))) == ["0.proj"]


class Ends(Reads):
    """What follows an else that returns runs only if the condition holds."""

    def forward(self, x: Tensor) -> Tensor:
        if self.slow:
            x = x + 1
        else:
            return self.proj(x)
        return F.linear(x, self.proj.weight)


def test_what_follows_an_else_that_returns_counts_if_the_condition_holds() -> None:
    off, on = Ends(), Ends()
    on.slow = True
    assert list(reasons(quantize_model(nn.ModuleList([off, on])))) == ["1.proj"]


# --- what cannot be followed ------------------------------------------------------------------------------------------


class Helper(Reads):
    def cast(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x.to(layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.cast(x, self.proj))


class StaticHelper(Reads):
    @staticmethod
    def cast(layer: nn.Linear, x: Tensor) -> Tensor:
        return x.to(layer.weight.dtype)


class ClassHelper(Reads):
    @classmethod
    def cast(cls, layer: nn.Linear, x: Tensor) -> Tensor:
        return x.to(layer.weight.dtype)


class Arguments(Reads):
    def forward(*both: Any) -> Tensor:
        self, x = both
        return F.linear(x, self.proj.weight)


class Returned(Reads):
    def layer(self) -> nn.Linear:
        return self.proj

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer().weight)


@pytest.mark.parametrize("kind", [Helper, StaticHelper, ClassHelper, Arguments, Returned])
def test_a_weight_that_cannot_be_followed_is_noted(kind: type[nn.Module]) -> None:
    (note,) = quantize_model(nn.Sequential(kind())).notes
    assert note.startswith(f"{kind.__name__} reads a weight that cannot be followed (test_weight_readers.py:")


def test_a_forward_put_on_an_instance_is_noted_if_it_cannot_be_followed() -> None:
    module = Reads()
    module.forward = lambda x: F.linear(x, module.proj.weight)  # type: ignore[method-assign]
    (note,) = quantize_model(nn.Sequential(module)).notes
    assert note.startswith("Reads reads a weight that cannot be followed (test_weight_readers.py:")


# --- no source, and ties ----------------------------------------------------------------------------------------------


def test_a_method_without_a_source_is_noted() -> None:
    made: dict[str, Any] = {"Reads": Reads}
    exec("class Hidden(Reads):\n    def forward(self, x):\n        return x @ self.proj.weight\n", made)
    report = quantize_model(nn.Sequential(made["Hidden"]()))
    assert report.notes == ("Hidden.forward may read weights itself, and its source is not to be had",)


def test_a_layer_tied_to_one_that_is_read_stays_dense() -> None:
    model = nn.ModuleDict({"reader": Product(), "tied": nn.Linear(64, 64)})
    model["tied"].weight = model["reader"].proj.weight
    report = quantize_model(model)
    assert "tied" not in names(report)
    assert reasons(report)["tied"] == "its weight is tied to reader.proj.weight"
