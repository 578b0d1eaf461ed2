"""The tensors that a model has room for, each once with all its names, and what fills them.

A Slot says where a tensor stands, a Filling what goes there. Nothing changes before a step or a replacement is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor, as_torch
from squish_nf4.checkpoint.messages import listed, shorten, shown
from squish_nf4.checkpoint.values import dtype_name
from squish_nf4.model.choose import Candidate
from squish_nf4.model.linear_kinds import as_linear, remember_class
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.nn.packed_weight import PackedWeight


@dataclass
class Slot:
    """One parameter or buffer. places: (module, attribute) of each name. required: in a state_dict of the model."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    required: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def nf4_layers(self) -> list[NF4Linear]:
        """The NF4 layers whose packed weight this tensor is; none if it is another tensor."""
        layers = [module for module, attribute in self.places if attribute == "weight"]
        return [layer for layer in layers if isinstance(layer, NF4Linear)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the tensor stands for: packed bytes have another one."""
        packed = self.nf4_layers
        return (packed[0].out_features, packed[0].in_features) if packed else tuple(self.tensor.shape)

    @property
    def extent(self) -> tuple[int, int]:
        """(first byte, byte past the last): the addresses between which its elements lie."""
        last = sum((n - 1) * step for n, step in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        start = self.tensor.data_ptr()
        return start, start + (last + 1) * self.tensor.itemsize if self.tensor.numel() else start

    def holds_overlapping(self) -> bool:
        """Whether elements may share memory, as after expand(): a step no longer than all that lies inside it."""
        reach = 0
        for step, n in sorted(zip(self.tensor.stride(), self.tensor.shape, strict=True)):
            if n > 1 and step <= reach:
                return True
            reach += (n - 1) * step
        return False

    def lies_exactly_on(self, other: Slot) -> bool:
        """Whether both are the same elements in memory, as after b.data = a.data."""
        a, b = self.tensor, other.tensor
        return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def slots_of(model: nn.Module) -> list[Slot]:
    """Every parameter and buffer but the scales of NF4 layers, which come and go with their packed weight.

    Raises:
        ValueError: a parameter is not initialized yet.
    """
    slots: dict[int, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        held = {**module._parameters, **module._buffers}
        for attribute, tensor in held.items():
            if tensor is None or (isinstance(module, NF4Linear) and attribute == "scales"):
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if is_lazy(tensor):
                raise ValueError(
                    f"load_into: {shown(name)} of the model is not initialized yet: run the model once first"
                )
            slot = slots.setdefault(id(tensor), Slot(tensor))
            slot.names.append(name)
            slot.places.append((module, attribute))
            slot.required |= attribute not in module._non_persistent_buffers_set
    return list(slots.values())


def missing_and_extra(slots: list[Slot], names: Collection[str]) -> tuple[list[str], list[str]]:
    """(what the model wants and names lack, what names have and the model does not). One name of a slot is enough."""
    known = {name for slot in slots for name in slot.names}
    missing = [slot.name for slot in slots if slot.required and not any(name in names for name in slot.names)]
    return missing, [name for name in names if name not in known]


def describe_misfit(missing: list[str], extra: list[str]) -> str:
    sides = []
    if missing:
        sides.append(f"the directory lacks {len(missing)} of the model's tensors ({listed(missing)})")
    if extra:
        sides.append(f"the model lacks {len(extra)} of the directory's tensors ({listed(extra)})")
    return " and ".join(sides)


Step = Callable[[], object]  # changes the model, or takes a change back


@dataclass(frozen=True)
class Replacement:
    """Something put in the place of something else, and how that is taken back."""

    take: Step
    undo: Step


def take_all_or_none(replacements: Sequence[Replacement]) -> None:
    """A module of the model may refuse what it is given; then none of it is changed."""
    taken: list[Replacement] = []
    try:
        for replacement in replacements:
            taken.append(replacement)
            replacement.take()
    except BaseException:
        for replacement in reversed(taken):
            replacement.undo()
        raise


@dataclass(frozen=True)
class Filling:
    """A stored tensor and its place in the model.

    linears: the layers that become NF4Linear. why_dense: why a weight in NF4 is decoded; None if it is not.
    """

    slot: Slot
    stored: StoredTensor
    linears: Sequence[Candidate]
    why_dense: str | None

    @property
    def stays_nf4(self) -> bool:
        return self.stored.kind == "nf4" and self.why_dense is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the values are read in."""
        return self.slot.tensor.dtype if self.slot.tensor.is_floating_point() else torch.float32

    @property
    def memory(self) -> int:
        """Bytes that the new values take, mapped ones apart."""
        if self.stays_nf4:
            return sum(file.header.nbytes for file in self.stored.files.values() if file.compressed)
        return self.stored.bytes_as(self.dtype)

    def require_fit(self) -> None:
        """ValueError: shape or dtype are not the model's, or it cannot be written to."""
        name, stored, tensor = shorten(self.slot.name), self.stored, self.slot.tensor
        if stored.shape != self.slot.shape:
            raise ValueError(f"{name} has shape {stored.shape} in the directory and {self.slot.shape} in the model")
        if self.slot.nf4_layers:
            if not self.stays_nf4:
                raise ValueError(
                    f"{name} is {self.why_dense or 'kept dense'} in the directory, and an NF4Linear's in the model; "
                    "leave that layer an nn.Linear: load_into makes an NF4Linear of it where the directory has NF4"
                )
            return
        found = stored.dtype
        if found != tensor.dtype and not (found.is_floating_point and tensor.is_floating_point()):
            raise ValueError(
                f"{name} is {dtype_name(found)} in the directory and {dtype_name(tensor.dtype)} in the model"
            )
        if self.slot.holds_overlapping() and not tensor.is_meta:
            raise ValueError(f"{name} of the model is a view whose elements share memory; make it contiguous")

    @property
    def in_place(self) -> bool:
        """Whether the model's own memory is written to."""
        return not self.stays_nf4 and not self.slot.tensor.is_meta

    def nf4_layers(self) -> Iterator[Replacement]:
        """Give layers the bytes as they lie in the files; layers that the model ties share them."""
        packed, scales = (as_torch(array).to(device_of(self.slot.tensor)) for array in self.stored.load_nf4())
        weight, group_size = PackedWeight(packed), self.stored.group_size or 1
        for layer in self.slot.nf4_layers:
            before = (layer.weight, layer.scales, layer.group_size)
            yield Replacement(partial(put, layer, weight, scales, group_size), partial(put, layer, *before))
        for candidate in self.linears:
            layer = as_nf4(candidate.module, weight, scales, group_size)
            yield Replacement(partial(place, candidate, layer), partial(put_back, candidate))

    def fill(self) -> Step:
        """The step that writes a dense tensor into the model's memory."""
        return partial(fill, self.slot.tensor, self.stored.read(self.dtype))

    def assignments(self, shared: bool) -> Iterator[Replacement]:
        """Give a dense tensor on meta its memory. shared: another one, not tied to it, has the same files."""
        value = self.stored.read(self.dtype)
        value = value.clone() if shared else value
        if isinstance(self.slot.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.slot.tensor.requires_grad)
        yield Replacement(partial(assign, self.slot, value), partial(assign, self.slot, self.slot.tensor))


def device_of(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def put(layer: NF4Linear, weight: Tensor, scales: Tensor, group_size: int) -> None:
    layer.weight, layer.scales, layer.group_size = weight, scales, group_size


def as_nf4(module: nn.Module, weight: PackedWeight, scales: Tensor, group_size: int) -> NF4Linear:
    """An NF4Linear on these bytes for a dense layer, still without its bias."""
    linear = as_linear(module)
    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    layer = NF4Linear(*sizes, linear.bias is not None, group_size=group_size, device="meta", dtype=dtype)
    put(layer, weight, scales, group_size)
    layer.train(linear.training)
    remember_class(layer, module)
    return layer


def place(candidate: Candidate, layer: NF4Linear) -> None:
    """Puts a layer in every place of a dense one, with the bias that this one has by now."""
    layer.bias = as_linear(candidate.module).bias
    for parent, attribute, _ in candidate.places:
        setattr(parent, attribute, layer)


def put_back(candidate: Candidate) -> None:
    """Undoes place, past what a parent does or refuses when an attribute is set."""
    for parent, attribute, _ in candidate.places:
        parent._modules[attribute] = candidate.module


def fill(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def assign(slot: Slot, value: Tensor) -> None:
    for module, attribute in slot.places:
        held = module._parameters if attribute in module._parameters else module._buffers
        held[attribute] = value  # type: ignore[assignment]


def have_same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors are equal bit for bit, and in the same form."""
    if (a.kind, a.shape) != (b.kind, b.shape):
        return False
    pairs = [(file, b.files[suffix]) for suffix, file in a.files.items() if suffix != "__shape"]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.load().tobytes() == y.load().tobytes() for x, y in pairs)
