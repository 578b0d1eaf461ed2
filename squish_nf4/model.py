"""Whole models: quantize_model and dequantize_model replace layers in place and say what they did and left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from squish_nf4.choose import Candidate, LeftAlone, as_patterns, children, choose
from squish_nf4.layout import cheapest_group_size
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.ops import may_look, relative_error, survey_nf4


@dataclass(frozen=True)
class LayerReport:
    """One layer that quantize_model has quantized.

    Attributes:
        name: its dotted name in the model.
        shape: (out_features, in_features).
        group_size: columns that share a scale.
        bits_per_weight: stored bits (nibbles, padding and scales) per logical weight.
        relative_rms_error: ||W - decoded|| / ||W||; None on meta.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    bits_per_weight: float
    relative_rms_error: float | None


@dataclass(frozen=True)
class QuantizeReport:
    """What quantize_model did; printed, a table of the layers and what was left alone.

    Attributes:
        layers: what was quantized.
        left_alone: the other modules with a weight, and why.
        notes: what a careful reader would want to know, a sentence each.
        bytes_before: of all parameters and buffers of the model, each once.
        bytes_after: the same, now.
    """

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
            lines.append(
                f"{layer.name:<48} {shape:>14} {layer.group_size:>5} {layer.bits_per_weight:>5.2f} {error:>10}"
            )
        lines += [f"left alone: {entry.name}: {entry.reason}" for entry in self.left_alone]
        lines += [f"note: {note}" for note in self.notes]
        count = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        done = f"{count} quantized" if self.layers else "nothing was quantized"
        lines.append(f"{done}; {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB")
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    *,
    group_size: int = 64,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by NF4Linear, in place.

    Tied weights stay tied. Left alone and reported: output heads (lm_head) and layers tied to an embedding, unless
    ``only`` names them; layers whose parent reads their weight itself (nn.MultiheadAttention,
    nn.TransformerEncoderLayer); modules that a transformers model keeps in float32, unless ``only`` names them;
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
        TypeError: ``model`` is no module, or is itself an nn.Linear, which cannot be replaced in place.
        ValueError: a weight holds NaN or infinity, group_size is not positive, or a pattern of only matches no module.
    """
    _require_module("quantize_model", model)
    if group_size < 1:
        raise ValueError(f"quantize_model: group_size must be at least 1, got {group_size}")
    if isinstance(model, nn.Linear) and not isinstance(model, NF4Linear):
        raise TypeError(
            "quantize_model: a bare nn.Linear cannot be replaced in place; use NF4Linear.from_linear(linear)"
        )
    skip, only = as_patterns(skip), None if only is None else as_patterns(only)
    candidates, left_alone, notes = choose(model, skip, only)
    for candidate in candidates:
        _require_finite(candidate)
    before = bytes_of(model)
    layers: list[LayerReport] = []
    replaced: dict[int, NF4Linear] = {}
    for candidate in candidates:
        layer, report = _quantize(candidate, group_size, replaced.get(id(candidate.module.weight)))
        replaced[id(candidate.module.weight)] = layer
        for parent, attribute, _ in candidate.places:
            setattr(parent, attribute, layer)
        layers.append(report)
    notes += _lost_on_meta(model)
    return QuantizeReport(tuple(layers), tuple(left_alone), tuple(notes), before, bytes_of(model))


def dequantize_model(model: nn.Module) -> tuple[str, ...]:
    """Replace every NF4Linear of a model by the nn.Linear that it computes, in place; tied weights stay tied.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: ``model`` is no module, or is itself an NF4Linear, which cannot be replaced in place.
    """
    _require_module("dequantize_model", model)
    if isinstance(model, NF4Linear):
        raise TypeError("dequantize_model: a bare NF4Linear cannot be replaced in place; use its to_linear()")
    dense: dict[int, nn.Linear] = {}
    weights: dict[int, Tensor] = {}
    names = []
    for parent, attribute, name, module in list(children(model)):
        if not isinstance(module, NF4Linear):
            continue
        if id(module) not in dense:
            linear = module.to_linear()
            linear.weight = weights.setdefault(id(module.weight), linear.weight)
            linear.bias = module.bias
            dense[id(module)] = linear
        setattr(parent, attribute, dense[id(module)])
        names.append(name)
    return tuple(names)


def _require_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")


def _require_finite(candidate: Candidate) -> None:
    weight = candidate.module.weight.detach()
    if not may_look(weight) or weight.numel() == 0 or all(bool(bound.isfinite()) for bound in weight.aminmax()):
        return
    row, column = (int(i) for i in (~weight.isfinite()).nonzero()[0])
    raise ValueError(
        f"quantize_model: {candidate.name}.weight holds {weight[row, column].item()} at row {row}, column {column}; "
        "NF4 encodes finite weights only (the model was not changed)"
    )


def _quantize(candidate: Candidate, group_size: int, tied: NF4Linear | None) -> tuple[NF4Linear, LayerReport]:
    linear = candidate.module
    group_size = cheapest_group_size(linear.in_features, group_size)
    layer = NF4Linear.from_linear(linear, group_size)
    if tied is not None:
        layer.weight, layer.scales = tied.weight, tied.scales
    if linear.bias is not None and not linear.bias.is_inference():
        layer.bias = linear.bias  # itself, not a copy: another module may hold it too
    shape = (linear.out_features, linear.in_features)
    error = _relative_rms_error(linear.weight.detach(), layer)
    return layer, LayerReport(candidate.name, shape, layer.group_size, layer.bits_per_weight, error)


def _relative_rms_error(weight: Tensor, layer: NF4Linear) -> float | None:
    if not may_look(weight):
        return None
    survey = survey_nf4(weight, layer.weight, layer.scales, layer.group_size)
    return relative_error(float(survey.squared_error.sum()), float(survey.square.sum()))


def _lost_on_meta(model: nn.Module) -> list[str]:
    lost = [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        for buffer in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(buffer) is not None and module._buffers[buffer].is_meta
    ]
    return [f"on meta and in no state_dict, build again after loading: {', '.join(lost)}"] if lost else []


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())
