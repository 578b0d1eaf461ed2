"""Which linear layers of a model are quantized, and why the others are left alone. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from squish_nf4.nn.linear import NF4Linear
from squish_nf4.ops import COMPUTE_DTYPES

OUTPUT_HEADS = ("lm_head", "embed_out")  # quantized only if `only` names them: errors there reach the output directly


@dataclass(frozen=True)
class LeftAlone:
    """One module with a weight that was not quantized.

    Attributes:
        name: its dotted name in the model.
        reason: why it was left alone, in words.
    """

    name: str
    reason: str


@dataclass
class Candidate:
    """A linear layer and every place where the model holds it."""

    module: nn.Linear
    places: list[tuple[nn.Module, str, str]]  # parent, attribute, full name

    @property
    def name(self) -> str:
        return self.places[0][2]


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or f".{pattern}." in f".{name}." for pattern in patterns)


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, child) for every place, also where one module stands at several."""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():  # named_children would name a module once per parent
            if child is not None:
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def choose(
    model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None
) -> tuple[list[Candidate], list[LeftAlone], list[str]]:
    """The layers to quantize, the modules to leave alone, and notes on what a reader of the report should know."""
    linears: dict[int, Candidate] = {}
    left_alone: dict[str, str] = {}
    for parent, attribute, name, module in children(model):
        if isinstance(module, nn.Linear):
            linears.setdefault(id(module), Candidate(module, [])).places.append((parent, attribute, name))
        elif _owns_matrix(module):
            left_alone[name] = f"{type(module).__name__} is not nn.Linear"
    notes = _unmatched(model, skip, only)
    chosen: dict[int, Candidate] = {}
    in_float32 = _kept_in_float32(model)
    for key, candidate in linears.items():
        reason = _reason_to_leave(candidate, skip, only, in_float32)
        if reason is None:
            chosen[key] = candidate
        else:
            left_alone[candidate.name] = reason
    holders = {key: _foreign_holder(model, candidate, chosen) for key, candidate in chosen.items()}
    for key, holder in holders.items():
        name = chosen[key].name
        if holder is not None and only and _matches(name, only):
            notes.append(f"{name}.weight was tied to {holder}, which stays dense: they are separate now")
        elif holder is not None:
            del chosen[key]
            left_alone[name] = f"its weight is tied to {holder}"
    return list(chosen.values()), [LeftAlone(name, reason) for name, reason in left_alone.items()], notes


def replaceable(model: nn.Module, in_nf4: Callable[[str], bool]) -> tuple[list[Candidate], dict[str, str]]:
    """The linear layers that are in NF4 already, where they come from, and that NF4Linear can stand for.

    Nobody's preference counts here, as it does in choose: an output head in NF4 stays in NF4.

    Args:
        in_nf4: whether the weight of this name is.

    Returns:
        The layers, and {weight: why it has to be dense in this model} of the other ones.
    """
    linears: dict[int, Candidate] = {}
    for parent, attribute, name, module in children(model):
        if isinstance(module, nn.Linear) and not isinstance(module, NF4Linear):
            linears.setdefault(id(module), Candidate(module, [])).places.append((parent, attribute, name))
    wanted = {
        id(candidate.module._parameters.get("weight"))  # shared by a layer whose own name nobody stored
        for candidate in linears.values()
        if any(in_nf4(f"{name}.weight") for _, _, name in candidate.places)
    }
    in_float32 = _kept_in_float32(model)
    chosen: dict[int, Candidate] = {}
    dense: dict[str, str] = {}
    for key, candidate in linears.items():
        names = [name for _, _, name in candidate.places]
        if id(candidate.module._parameters.get("weight")) not in wanted:
            continue
        holder = _float32_holder(names, in_float32)
        reason = f"{holder} keeps it in float32" if holder else _reason_in_place(candidate)
        if reason is None:
            chosen[key] = candidate
        else:
            dense |= dict.fromkeys((f"{name}.weight" for name in names), reason)
    holders = {key: _foreign_holder(model, candidate, chosen) for key, candidate in chosen.items()}
    for key, foreign in holders.items():
        if foreign is not None:
            places = chosen.pop(key).places
            dense |= {f"{name}.weight": f"it is tied to {foreign}" for _, _, name in places}
    return list(chosen.values()), dense


def _owns_matrix(module: nn.Module) -> bool:
    parameters = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    return any(p.is_floating_point() and p.dim() >= 2 for p in parameters)


def _unmatched(model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None) -> list[str]:
    """Notes on patterns of ``skip`` that match nothing: one list may serve many models. For ``only`` it is an error."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]

    def unmatched(patterns: tuple[str, ...]) -> list[str]:
        return [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in names)]

    for pattern in unmatched(only or ()):
        raise ValueError(f"quantize_model: only pattern '{pattern}' matches no module of this model")
    return [f"skip pattern '{pattern}' matches no module of this model" for pattern in unmatched(skip)]


def _kept_in_float32(model: nn.Module) -> dict[str, str]:
    """Patterns of the modules that a transformers model casts activations for, and the class that says so.

    T5 reads the dtype of such a weight in its forward, which packed bytes would answer with uint8.
    """
    patterns: dict[str, str] = {}
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for pattern in getattr(module, attribute, None) or ():
                patterns.setdefault(pattern, type(module).__name__)
    return patterns


def _reason_to_leave(
    candidate: Candidate, skip: tuple[str, ...], only: tuple[str, ...] | None, in_float32: dict[str, str]
) -> str | None:
    module, names = candidate.module, [name for _, _, name in candidate.places]
    if isinstance(module, NF4Linear):
        return "already NF4"
    if any(_matches(name, skip) for name in names):
        return "skip names it"
    if only is not None and not any(_matches(name, only) for name in names):
        return "only does not name it"
    if only is None and any(name.split(".")[-1] in OUTPUT_HEADS for name in names):
        return "an output head; name it in only to quantize it"
    if only is None and (holder := _float32_holder(names, in_float32)):
        return f"{holder} keeps it in float32; name it in only to quantize it"
    return _reason_in_place(candidate)


def _float32_holder(names: list[str], in_float32: dict[str, str]) -> str | None:
    return next((holder for pattern, holder in in_float32.items() if any(_matches(n, [pattern]) for n in names)), None)


def _reason_in_place(candidate: Candidate) -> str | None:
    """Why NF4Linear could not stand where this layer does."""
    for parent, attribute, _ in candidate.places:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight itself"
        if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
            return "the fast path of nn.TransformerEncoderLayer reads its weight itself"
    return _reason_in_layer(candidate.module)


def _reason_in_layer(module: nn.Linear) -> str | None:
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "it is not initialized yet: run the model once first"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if module.weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {module.weight.dtype}; float32, bfloat16 and float16 are computed"
    return None


def _foreign_holder(model: nn.Module, candidate: Candidate, chosen: dict[int, Candidate]) -> str | None:
    """The name of a parameter that is this layer's weight and belongs to a module that stays dense, or None."""
    for name, module in model.named_modules():
        if id(module) in chosen:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter is candidate.module.weight:
                return f"{name}.{parameter_name}" if name else parameter_name
    return None
