"""Whole models: quantize_model and dequantize_model replace layers in place and say what they did and what they left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from squish_nf4.layout import cheapest_group_size
from squish_nf4.linear import NF4Linear

OUTPUT_HEADS = ("lm_head", "embed_out")  # quantized only if `only` names them: errors there reach the output directly
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. relative_rms_error: ||W - decoded|| / ||W||, None on meta."""

    name: str
    shape: tuple[int, int]
    group_size: int
    bits_per_weight: float
    relative_rms_error: float | None


@dataclass(frozen=True)
class LeftAlone:
    """One module with a weight that was not quantized, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class QuantizeReport:
    """What quantize_model did. bytes_before and bytes_after: all parameters and buffers of the model, each once."""

    layers: tuple[LayerReport, ...]
    left_alone: tuple[LeftAlone, ...]
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{'layer':<48} {'shape':>14} {'group':>5} {'bits':>5} {'rel. error':>10}"] if self.layers else []
        for layer in self.layers:
            error = "-" if layer.relative_rms_error is None else f"{layer.relative_rms_error:.4f}"
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(f"{layer.name:<48} {shape:>14} {layer.group_size:>5} {layer.bits_per_weight:>5.2f} {error:>10}")
        lines += [f"left alone: {entry.name}: {entry.reason}" for entry in self.left_alone]
        lines += [f"note: {note}" for note in self.notes]
        done = f"{len(self.layers)} layers quantized" if self.layers else "nothing was quantized"
        lines.append(f"{done}; {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB")
        return "\n".join(lines)


@dataclass
class _Candidate:
    """A linear layer and every place where the model holds it."""

    module: nn.Linear
    places: list[tuple[nn.Module, str, str]]  # parent, attribute, full name

    @property
    def name(self) -> str:
        return self.places[0][2]


def quantize_model(
    model: nn.Module,
    *,
    group_size: int = 64,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by NF4Linear, in place.

    Tied weights stay tied. Left alone and reported: output heads (lm_head) and layers tied to an embedding, unless
    ``only`` names them; layers whose parent reads their weight itself (nn.MultiheadAttention, nn.TransformerEncoderLayer);
    parametrized layers, layers with hooks, and subclasses of nn.Linear with a forward of their own. All weights are
    looked at before the first is replaced: if one is refused, the model is as it was.

    Args:
        model: any module; on the meta device it becomes the empty structure to load a saved state into.
        group_size: columns that share a scale. A narrow layer that it does not divide gets the smaller size that
            stores it in the fewest bits (the report says which).
        skip: name patterns to leave alone: "lm_head" or "encoder.layer.0" match these components anywhere in a
            module's dotted name, "*.mlp.*" is a glob over the whole name.
        only: patterns of the only names to quantize.

    Returns:
        What was quantized, what was left alone and why.

    Raises:
        TypeError: ``model`` is itself an nn.Linear, which cannot be replaced in place.
        ValueError: a weight holds NaN or infinity, group_size is not positive, or a pattern matches no module.
    """
    if group_size < 1:
        raise ValueError(f"quantize_model: group_size must be at least 1, got {group_size}")
    if isinstance(model, nn.Linear) and not isinstance(model, NF4Linear):
        raise TypeError("quantize_model: a bare nn.Linear cannot be replaced in place; use NF4Linear.from_linear(linear)")
    skip, only = _as_patterns(skip), None if only is None else _as_patterns(only)
    candidates, left_alone = _choose(model, skip, only)
    for candidate in candidates:
        _require_finite(candidate)
    before = _bytes_of(model)
    layers, replaced = [], {}
    for candidate in candidates:
        layer, report = _quantize(candidate, group_size, replaced.get(id(candidate.module.weight)))
        replaced[id(candidate.module.weight)] = layer
        for parent, attribute, _ in candidate.places:
            setattr(parent, attribute, layer)
        layers.append(report)
    return QuantizeReport(tuple(layers), tuple(left_alone), tuple(_notes(model)), before, _bytes_of(model))


def dequantize_model(model: nn.Module) -> tuple[str, ...]:
    """Replace every NF4Linear of a model by the nn.Linear that it computes, in place; tied weights stay tied.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: ``model`` is itself an NF4Linear, which cannot be replaced in place.
    """
    if isinstance(model, NF4Linear):
        raise TypeError("dequantize_model: a bare NF4Linear cannot be replaced in place; use its to_linear()")
    dense: dict[int, nn.Linear] = {}
    weights: dict[int, nn.Parameter] = {}
    names = []
    for parent, attribute, name, module in list(_children(model)):
        if not isinstance(module, NF4Linear):
            continue
        if id(module) not in dense:
            linear = module.to_linear()
            linear.weight = weights.setdefault(id(module.weight), linear.weight)
            dense[id(module)] = linear
        setattr(parent, attribute, dense[id(module)])
        names.append(name)
    return tuple(names)


def _as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or f".{pattern}." in f".{name}." for pattern in patterns)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, child) for every place, also where one module stands at several."""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():  # named_children would name a module once per parent
            if child is not None:
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def _choose(
    model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None
) -> tuple[list[_Candidate], list[LeftAlone]]:
    linears: dict[int, _Candidate] = {}
    left_alone: dict[str, str] = {}
    for parent, attribute, name, module in _children(model):
        if isinstance(module, nn.Linear):
            linears.setdefault(id(module), _Candidate(module, [])).places.append((parent, attribute, name))
        elif _owns_matrix(module):
            left_alone[name] = f"{type(module).__name__} is not nn.Linear"
    _require_matches(model, skip, only)
    chosen: dict[int, _Candidate] = {}
    for key, candidate in linears.items():
        reason = _reason_to_leave(candidate, skip, only)
        if reason is None:
            chosen[key] = candidate
        else:
            left_alone[candidate.name] = reason
    for key, candidate in list(chosen.items()):
        holder = _foreign_holder(model, candidate, chosen)
        if holder is not None and not (only and _matches(candidate.name, only)):
            del chosen[key]
            left_alone[candidate.name] = f"its weight is tied to {holder}"
    return list(chosen.values()), [LeftAlone(name, reason) for name, reason in left_alone.items()]


def _owns_matrix(module: nn.Module) -> bool:
    return any(p.is_floating_point() and p.dim() >= 2 for p in module.parameters(recurse=False))


def _require_matches(model: nn.Module, skip: tuple[str, ...], only: tuple[str, ...] | None) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for what, patterns in (("skip", skip), ("only", only or ())):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in names):
                raise ValueError(f"quantize_model: {what} pattern '{pattern}' matches no module of this model")


def _reason_to_leave(candidate: _Candidate, skip: tuple[str, ...], only: tuple[str, ...] | None) -> str | None:
    module, names = candidate.module, [name for _, _, name in candidate.places]
    if isinstance(module, NF4Linear):
        return "already NF4"
    if any(_matches(name, skip) for name in names):
        return "skip names it"
    if only is not None and not any(_matches(name, only) for name in names):
        return "only does not name it"
    if only is None and any(name.split(".")[-1] in OUTPUT_HEADS for name in names):
        return "an output head; name it in only to quantize it"
    for parent, attribute, _ in candidate.places:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight itself"
        if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
            return "the fast path of nn.TransformerEncoderLayer reads its weight itself"
    return _reason_in_layer(module)


def _reason_in_layer(module: nn.Linear) -> str | None:
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if module.weight.dtype not in _COMPUTE_DTYPES:
        return f"its weight is {module.weight.dtype}; float32, bfloat16 and float16 are computed"
    return None


def _foreign_holder(model: nn.Module, candidate: _Candidate, chosen: dict[int, _Candidate]) -> str | None:
    """The name of a parameter that is this layer's weight and belongs to a module that stays dense, or None."""
    for name, module in model.named_modules():
        if id(module) in chosen:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter is candidate.module.weight:
                return f"{name}.{parameter_name}" if name else parameter_name
    return None


def _require_finite(candidate: _Candidate) -> None:
    weight = candidate.module.weight.detach()
    if weight.is_meta or weight.numel() == 0 or all(bool(bound.isfinite()) for bound in weight.aminmax()):
        return
    row, column = (int(i) for i in (~weight.isfinite()).nonzero()[0])
    raise ValueError(
        f"quantize_model: {candidate.name}.weight holds {weight[row, column].item()} at row {row}, column {column}; "
        "NF4 encodes finite weights only (the model was not changed)"
    )


def _quantize(candidate: _Candidate, group_size: int, tied: NF4Linear | None) -> tuple[NF4Linear, LayerReport]:
    linear = candidate.module
    group_size = cheapest_group_size(linear.in_features, group_size)
    layer = NF4Linear.from_linear(linear, group_size)
    if tied is not None:
        layer.weight, layer.scales = tied.weight, tied.scales
    shape = (linear.out_features, linear.in_features)
    error = _relative_rms_error(linear.weight.detach(), layer)
    return layer, LayerReport(candidate.name, shape, layer.group_size, layer.bits_per_weight, error)


def _relative_rms_error(weight: Tensor, layer: NF4Linear) -> float | None:
    """In float64, some rows at a time: no second dense copy of a large layer."""
    if weight.is_meta:
        return None
    rows_at_once = max(1, (1 << 22) // max(1, weight.size(1)))
    squared_error = squared_norm = 0.0
    for row in range(0, weight.size(0), rows_at_once):
        rows = slice(row, row + rows_at_once)
        decoded = torch.ops.squish.dequantize_nf4(layer.weight[rows], layer.scales[rows], layer.group_size)
        exact = weight[rows].double()
        squared_error += float((decoded[:, : layer.in_features].double() - exact).square().sum())
        squared_norm += float(exact.square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm > 0 else 0.0


def _notes(model: nn.Module) -> list[str]:
    lost = [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        for buffer in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(buffer) is not None and module._buffers[buffer].is_meta  # type: ignore[union-attr]
    ]
    return [f"on meta and in no state_dict, build again after loading: {', '.join(lost)}"] if lost else []


def _bytes_of(model: nn.Module) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())
