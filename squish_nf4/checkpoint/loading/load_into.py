"""load_into: a squish directory into a model, what is in NF4 as NF4.

First everything is checked and made ready. Then the model is changed: layers and tensors are put in their places, which
is taken back if one fails, and last values are written into the memory that is there.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from squish_nf4.checkpoint.directory.reader import SquishDirectory, open_directory
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.loading.slots import (
    Filling,
    Replacement,
    Slot,
    Step,
    describe_misfit,
    have_same_values,
    missing_and_extra,
    slots_of,
    take_all_or_none,
)
from squish_nf4.checkpoint.messages import listed, shown, visible
from squish_nf4.checkpoint.resources import require_memory
from squish_nf4.model.choose import Candidate, replaceable
from squish_nf4.model.linear_kinds import weight_of
from squish_nf4.model.transformers_models import guard_resizing


@dataclass(frozen=True)
class LoadReport:
    """What load_into did, by the names of the model.

    Attributes:
        nf4: weights that are computed on in NF4.
        decoded: weights that are in NF4 in the directory and dense in the model, with the reason.
        kept: the other tensors that were filled.
        missing: names of the model alone, which strict=False let pass.
        extra: names of the directory alone, likewise.
        on_meta: buffers that no checkpoint has, and that have no memory yet: build them again.
    """

    nf4: tuple[str, ...]
    decoded: Mapping[str, str]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    on_meta: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.nf4)} weights in NF4, {len(self.decoded)} decoded, {len(self.kept)} kept tensors"]
        lines += [f"decoded: {shown(name)}: {visible(reason)}" for name, reason in self.decoded.items()]
        lines += [f"missing: {shown(name)}" for name in self.missing]
        lines += [f"not in the model: {shown(name)}" for name in self.extra]
        lines += [f"on meta and in no checkpoint, build it again: {shown(name)}" for name in self.on_meta]
        return "\n".join(lines)


def load_into(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> LoadReport:
    """Fill a model from a squish directory, in place: weights that are in NF4 there are computed on in NF4.

    Every nn.Linear whose weight is in NF4 becomes an NF4Linear on the same bytes, without a dense detour, unless it
    would break where it stands or shares its weight with an embedding: the report says which, and why. All other
    tensors take the model's dtype. What is on meta gets memory on the CPU, mapped to the file where its dtype allows;
    anything else is filled where it is. The model's ties stay, and a tied tensor needs one of its names only.
    Non-persistent buffers are filled if the directory has them.

    Args:
        model: any module, on any device; on meta it takes no memory before.
        path: the squish directory, ours or another program's.
        strict: refuse names that only one side has. False: report them.

    Returns:
        What became of each tensor.

    Raises:
        FileNotFoundError: there is no such directory.
        TypeError: the model is no module, or is or holds a ScriptModule.
        ValueError: the directory is damaged or was changed while it was read, or a name, shape, dtype or value does
            not fit. The model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_into: model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("load_into: a ScriptModule cannot be filled; load into the module that it is scripted from")
    directory = open_directory(path)
    slots = slots_of(model)
    missing, extra = missing_and_extra(slots, directory.tensors)
    if strict and (missing or extra):
        raise ValueError(f"load_into: {directory.path} does not fit the model: {describe_misfit(missing, extra)}")
    try:
        with directory.snapshot.held():
            fillings = pair(model, slots, directory)
            replacements, fills = prepare(fillings)
    except ValueError as error:
        raise ValueError(f"load_into: {error} (the model was not changed)") from error
    take_all_or_none(replacements)
    for fill in fills:
        fill()
    guard_resizing(model)
    known = {*missing, *(filling.slot.name for filling in fillings)}
    return LoadReport(
        nf4=tuple(filling.slot.name for filling in fillings if filling.stays_nf4),
        decoded={filling.slot.name: filling.why_dense for filling in fillings if filling.why_dense},
        kept=tuple(filling.slot.name for filling in fillings if filling.stored.kind == "kept"),
        missing=tuple(missing),
        extra=tuple(extra),
        on_meta=tuple(slot.name for slot in slots if slot.tensor.is_meta and slot.name not in known),
    )


def pair(model: nn.Module, slots: list[Slot], directory: SquishDirectory) -> list[Filling]:
    """What goes where, and how; all of it fits."""
    stored = directory.tensors
    layers, dense = replaceable(model, lambda name: name in stored and stored[name].kind == "nf4")
    layers_of: defaultdict[int, list[Candidate]] = defaultdict(list)
    for layer in layers:
        layers_of[id(weight_of(layer.module))].append(layer)
    fillings = []
    for slot in slots:
        if tensor := find_stored(slot, directory):
            linears = layers_of[id(slot.tensor)]
            why_dense = reason_to_decode(slot, tensor, linears, dense) if tensor.kind == "nf4" else None
            fillings.append(Filling(slot, tensor, linears, why_dense))
            fillings[-1].require_fit()
    require_apart([filling for filling in fillings if filling.in_place])
    return fillings


def require_apart(fillings: list[Filling]) -> None:
    """ValueError: tensors that the model does not tie share memory, so that one would be filled over the other."""
    filled = [filling for filling in fillings if filling.slot.tensor.numel()]
    ordered = sorted(filled, key=lambda filling: (str(filling.slot.tensor.device), filling.slot.extent))
    for before, after in pairwise(ordered):
        if before.slot.tensor.device != after.slot.tensor.device or after.slot.extent[0] >= before.slot.extent[1]:
            continue
        if not (after.slot.lies_exactly_on(before.slot) and have_same_values(before.stored, after.stored)):
            names = listed([before.slot.name, after.slot.name])
            raise ValueError(f"{names} share memory in the model: one would be filled over the other; tie or part them")


def find_stored(slot: Slot, directory: SquishDirectory) -> StoredTensor | None:
    """What the directory has under any of the slot's names; None if it has nothing."""
    found = {name: directory.tensors[name] for name in slot.names if name in directory.tensors}
    if not found:
        return None
    first, *others = {tensor.name: tensor for tensor in found.values()}.values()
    if not all(have_same_values(first, other) for other in others):
        raise ValueError(f"{listed(list(found))} are one tensor in the model, and differ in the directory")
    return first


def reason_to_decode(
    slot: Slot, stored: StoredTensor, linears: list[Candidate], dense: Mapping[str, str]
) -> str | None:
    """None: the weight can be computed on as it is stored."""
    if not linears and not slot.nf4_layers:
        if any(isinstance(module, nn.Linear) and attribute == "weight" for module, attribute in slot.places):
            default = "the model is that nn.Linear itself, and stays the same object"
        else:
            default = "it is not the weight of an nn.Linear"
        return next((dense[name] for name in slot.names if name in dense), default)
    return None if stored.matrix_shape == slot.shape else f"stored in rows of {stored.matrix_shape[1]}"


def prepare(fillings: list[Filling]) -> tuple[list[Replacement], list[Step]]:
    """Reads everything: what is to be replaced, and the steps that write into memory. Replaced layers come last: a new
    layer takes the bias that is there then."""
    require_memory(sum(filling.memory for filling in fillings), "what is to be loaded")
    uses = Counter(filling.stored.name for filling in fillings if not filling.stays_nf4)
    replacements: list[Replacement] = []
    fills: list[Step] = []
    with torch.inference_mode(False), torch.no_grad():
        for filling in fillings:
            if filling.in_place:
                fills.append(filling.fill())
            elif not filling.stays_nf4:
                replacements += filling.assignments(shared=uses[filling.stored.name] > 1)
        for filling in fillings:
            if filling.stays_nf4:
                replacements += filling.nf4_layers()
    return replacements, fills
