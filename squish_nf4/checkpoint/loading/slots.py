"""The tensors that a model has room for: each parameter and buffer once, with all its names. Nothing changes here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from squish_nf4.checkpoint.messages import listed
from squish_nf4.nn.linear import NF4Linear


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
        """Those whose packed weight this is; none for another tensor."""
        layers = [module for module, attribute in self.places if attribute == "weight"]
        return [layer for layer in layers if isinstance(layer, NF4Linear)]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight that is meant: a packed one has another."""
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
                raise ValueError(f"load_into: {name} of the model is not initialized yet: run the model once first")
            slot = slots.setdefault(id(tensor), Slot(tensor))
            slot.names.append(name)
            slot.places.append((module, attribute))
            slot.required |= attribute not in module._non_persistent_buffers_set
    return list(slots.values())


def compare_names(slots: list[Slot], names: Collection[str]) -> tuple[list[str], list[str]]:
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
