"""Which linear layers of a model are quantized, and why the others are left alone. Nothing is changed here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from squish_nf4.model.in_place import reason_in_place
from squish_nf4.model.linear_kinds import is_linear, weight_of
from squish_nf4.model.report import LeftAlone, bytes_of
from squish_nf4.model.source_scan.readers import Readers, weight_readers
from squish_nf4.model.transformers_models import computes_with_tying, kept_in_float32, output_heads
from squish_nf4.nn.linear import NF4Linear

HEAD_NAMES = ("lm_head", "embed_out")  # quantized only if `only` names them: errors there reach the output directly
POSITIONS = re.compile(r"(^|[._])pos", re.IGNORECASE)  # embed_positions.weight, pos_embed
ADVICE = "; name it in only to quantize it"


@dataclass
class Candidate:
    """A linear layer and every place where the model holds it.

    Attributes:
        module: an nn.Linear, or another one that computes the same.
        places: (parent, attribute, full name) of each.
        tied_to: a dense parameter that its weight is now, and will not be.
    """

    module: nn.Module
    places: list[tuple[nn.Module, str, str]]
    tied_to: str | None = None

    @property
    def name(self) -> str:
        return self.places[0][2]

    @property
    def names(self) -> list[str]:
        return [name for _, _, name in self.places]


@dataclass(frozen=True)
class Holder:
    """A module that holds a parameter under a name."""

    module: nn.Module
    module_name: str
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or f".{pattern}." in f".{name}." for pattern in patterns)


def _names_itself(pattern: str, name: str) -> bool:
    """Whether a pattern names this module, and not only one that holds it; "*" names everything."""
    own = pattern.split(".")[-1]
    return pattern == "*" or (own != "*" and fnmatchcase(name.split(".")[-1], own) and _matches(name, [pattern]))


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, child) for every place, also where one module stands at several."""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():  # named_children would name a module once per parent
            if child is not None:
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def candidates_of(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> dict[int, Candidate]:
    """Each module of a kind with all its places, by its id."""
    found: dict[int, Candidate] = {}
    for parent, attribute, name, module in children(model):
        if is_one(module):
            found.setdefault(id(module), Candidate(module, [])).places.append((parent, attribute, name))
    return found


def choose(
    model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None
) -> tuple[list[Candidate], list[LeftAlone], list[str]]:
    """The layers to quantize, the modules to leave alone, and notes on what a reader of the report should know."""
    linears = candidates_of(model, is_linear)
    left_alone = {
        name: (f"{type(module).__name__} is not nn.Linear", module)
        for _, _, name, module in children(model)
        if not is_linear(module) and _owns_matrix(module)
    }
    notes = _unmatched(model, skip, only)
    readers = weight_readers(model)
    notes += readers.notes
    preferences = _Preferences(model, skip, only)
    chosen: dict[int, Candidate] = {}
    for key, candidate in linears.items():
        reason = preferences.reason_to_leave(candidate, readers)
        if reason is None:
            chosen[key] = candidate
        else:
            left_alone[candidate.name] = (reason, candidate.module)
    for candidate, holder in _tied_to_dense(model, chosen):
        reason = f"its weight is tied to {holder.name}"
        if only and any(_matches(name, only) for name in candidate.names):
            if (owner := computes_with_tying(model, candidate.module)) is None:
                candidate.tied_to = holder.name
                continue
            reason += f", and {owner} computes something else if config.tie_word_embeddings is False"
        del chosen[id(candidate.module)]
        left_alone[candidate.name] = (reason, candidate.module)
    entries = [LeftAlone(name, reason, _own_bytes(module)) for name, (reason, module) in left_alone.items()]
    return list(chosen.values()), entries, notes


def replaceable(model: nn.Module, in_nf4: Callable[[str], bool]) -> tuple[list[Candidate], dict[str, str]]:
    """The linear layers that are in NF4 already, where they come from, and that NF4Linear can stand for.

    Nobody's preference counts here, as it does in choose: an output head in NF4 stays in NF4.

    Args:
        in_nf4: whether the weight of this name is.

    Returns:
        The layers, and {weight: why it has to be dense in this model} of the other ones.
    """
    linears = candidates_of(model, lambda module: isinstance(module, nn.Linear) and not isinstance(module, NF4Linear))
    wanted = {
        id(weight_of(candidate.module))  # shared by a layer whose own name nobody stored
        for candidate in linears.values()
        if any(in_nf4(f"{name}.weight") for name in candidate.names)
    }
    in_float32 = kept_in_float32(model)
    readers = weight_readers(model)
    chosen: dict[int, Candidate] = {}
    dense: dict[str, str] = {}
    for key, candidate in linears.items():
        if id(weight_of(candidate.module)) not in wanted:
            continue
        owner = _float32_holder(candidate.names, in_float32)
        reason = f"{owner} keeps it in float32" if owner else _reason_in_place(candidate, readers)
        if reason is None:
            chosen[key] = candidate
        else:
            dense |= dict.fromkeys((f"{name}.weight" for name in candidate.names), reason)
    for candidate, holder in _tied_to_dense(model, chosen):
        del chosen[id(candidate.module)]
        why = dense.get(holder.name, f"{type(holder.module).__name__} is not nn.Linear")
        reason = f"{holder.name} is the same tensor, and stays dense: {why}"
        dense |= {f"{name}.weight": reason for name in candidate.names}
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


class _Preferences:
    """What the caller asked for, and what is left alone unless it is asked for."""

    def __init__(self, model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None) -> None:
        self.skip, self.only = skip, only
        self.heads = output_heads(model)
        self.in_float32 = kept_in_float32(model)
        self.something_is_frozen = any(_is_frozen(name, module) for name, module in model.named_modules())

    def reason_to_leave(self, candidate: Candidate, readers: Readers) -> str | None:
        module, names = candidate.module, candidate.names
        if isinstance(module, NF4Linear):
            return "already NF4"
        if any(_matches(name, self.skip) for name in names):
            return "skip names it"
        if self.only is not None and not any(_matches(name, self.only) for name in names):
            return "only does not name it"
        never = _reason_in_place(candidate, readers)
        by_itself = any(_names_itself(pattern, name) for pattern in self.only or () for name in names)
        if not by_itself and self.something_is_frozen and _is_trainable(module):
            return "it is being trained, while others are frozen" + ("" if never else ADVICE)
        if self.only is None and never is None and (reason := self._reason_by_default(module, names)):
            return reason + ADVICE
        return never

    def _reason_by_default(self, module: nn.Module, names: list[str]) -> str | None:
        if id(module) in self.heads or any(name.split(".")[-1] in HEAD_NAMES for name in names):
            return "an output head"
        owner = _float32_holder(names, self.in_float32)
        return f"{owner} keeps it in float32" if owner else None


def _is_trainable(module: nn.Module) -> bool:
    weight = weight_of(module)
    return weight is not None and weight.requires_grad


def _is_frozen(name: str, module: nn.Module) -> bool:
    """Whether somebody has stopped the training of a matrix, or of the weight of a norm, that this module holds.

    What some models freeze themselves does not count: positions, which are known by their name, and what has a single
    row. Nor do packed weights, which nobody trains, but the bias beside them does.
    """
    if isinstance(module, NF4Linear):
        return module.bias is not None and not module.bias.requires_grad
    if "Norm" in type(module).__name__:
        weight = weight_of(module)
        return weight is not None and weight.is_floating_point() and not weight.requires_grad
    return any(
        parameter.is_floating_point() and not parameter.requires_grad
        for attribute, parameter in module.named_parameters(name, recurse=False)
        if not is_lazy(parameter) and sum(size > 1 for size in parameter.shape) > 1 and not POSITIONS.search(attribute)
    )


def _float32_holder(names: list[str], in_float32: dict[str, str]) -> str | None:
    return next((holder for pattern, holder in in_float32.items() if any(_matches(n, [pattern]) for n in names)), None)


def _reason_in_place(candidate: Candidate, readers: Readers) -> str | None:
    """Why NF4Linear could not stand where this layer does."""
    return reason_in_place(candidate.module, candidate.places) or readers.of.get(id(candidate.module))


def _own_bytes(module: nn.Module) -> int:
    return sum(bytes_of(parameter) for parameter in module.parameters(recurse=False) if not is_lazy(parameter))


def _tied_to_dense(model: nn.Module, chosen: dict[int, Candidate]) -> list[tuple[Candidate, Holder]]:
    """The layers among the chosen whose weight a module holds that stays dense, and where."""
    holders: defaultdict[int, list[Holder]] = defaultdict(list)
    for name, module in model.named_modules():
        if id(module) not in chosen:
            for attribute, parameter in module.named_parameters(recurse=False):
                holders[id(parameter)].append(Holder(module, name, attribute))
    tied = [(candidate, holders.get(id(weight_of(candidate.module)))) for candidate in chosen.values()]
    return [(candidate, found[0]) for candidate, found in tied if found]
