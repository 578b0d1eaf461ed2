"""One tensor of a squish directory and its place in a model: whether they fit, and the steps that fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor, as_torch
from squish_nf4.checkpoint.loading.slots import Slot
from squish_nf4.checkpoint.messages import shorten
from squish_nf4.checkpoint.values import dtype_name
from squish_nf4.choose import Candidate
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.nn.packed import PackedWeight

Step = Callable[[], object]  # changes the model; everything that can fail has happened before


@dataclass(frozen=True)
class Filling:
    """linears: the layers that become NF4Linear. why_dense: why a weight in NF4 is decoded, None if it is not."""

    slot: Slot
    stored: StoredTensor
    linears: Sequence[Candidate]
    why_dense: str | None

    @property
    def stays_nf4(self) -> bool:
        return self.stored.kind == "nf4" and self.why_dense is None

    @property
    def dtype(self) -> torch.dtype:
        """What the values are read as."""
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

    def nf4_steps(self) -> Iterator[Step]:
        """The bytes as they lie in the files, into layers that share them if the model ties them."""
        packed, scales = (as_torch(array).to(device_of(self.slot.tensor)) for array in self.stored.load_nf4())
        weight, group_size = PackedWeight(packed, False), self.stored.group_size or 1
        for layer in self.slot.nf4_layers:
            yield partial(put, layer, weight, scales, group_size)
        for candidate in self.linears:
            yield partial(replace, candidate, weight, scales, group_size)

    def dense_step(self, shared: bool) -> Step:
        """shared: another tensor of the model, which is not tied to this one, is filled from the same files."""
        value = self.stored.read(self.dtype)
        if not self.slot.tensor.is_meta:
            return partial(fill, self.slot.tensor, value)
        value = value.clone() if shared else value
        if isinstance(self.slot.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.slot.tensor.requires_grad)
        return partial(assign, self.slot, value)


def device_of(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def put(layer: NF4Linear, weight: PackedWeight, scales: Tensor, group_size: int) -> None:
    layer.weight, layer.scales, layer.group_size = weight, scales, group_size


def replace(candidate: Candidate, weight: PackedWeight, scales: Tensor, group_size: int) -> None:
    """An NF4Linear in every place of a dense layer, with its bias, which has been filled before."""
    linear = candidate.module
    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    layer = NF4Linear(*sizes, linear.bias is not None, group_size=group_size, device="meta", dtype=dtype)
    put(layer, weight, scales, group_size)
    layer.bias = linear.bias
    layer.train(linear.training)
    for parent, attribute, _ in candidate.places:
        setattr(parent, attribute, layer)


def fill(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def assign(slot: Slot, value: Tensor) -> None:
    for module, attribute in slot.places:
        held = module._parameters if attribute in module._parameters else module._buffers
        held[attribute] = value  # type: ignore[assignment]


def have_same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Bit for bit, and in the same form."""
    if (a.kind, a.shape) != (b.kind, b.shape):
        return False
    pairs = [(file, b.files[suffix]) for suffix, file in a.files.items() if suffix != "__shape"]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.load().tobytes() == y.load().tobytes() for x, y in pairs)
