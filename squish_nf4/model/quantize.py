"""Whole models: quantize_model and dequantize_model replace layers in place and say what they did and left alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from squish_nf4.layout import cheapest_group_size
from squish_nf4.model.choose import Candidate, as_patterns, children, choose
from squish_nf4.model.linear_kinds import (
    as_it_was,
    as_linear,
    is_conv1d,
    is_linear,
    remember_class,
    wants_linear,
    weight_of,
)
from squish_nf4.model.report import LayerReport, QuantizeReport, weigh
from squish_nf4.model.transformers_models import guard_resizing, untie
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.ops import may_look, relative_error, survey_nf4


def quantize_model(
    model: nn.Module,
    *,
    group_size: int = 64,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
) -> QuantizeReport:
    """Replace the linear layers of a model by NF4Linear, in place.

    Tied weights stay tied. Left alone and reported, unless ``only`` names them: output heads, layers tied to an
    embedding, modules that a transformers model keeps in float32, and trainable layers of a model that is frozen in
    part, such as adapters. Always left alone: layers whose weight another module reads instead of calling them, as its
    source says; parametrized layers, layers with hooks or with more than an nn.Linear has, subclasses with a forward of
    their own, and tied heads of models that compute with config.tie_word_embeddings. All weights are looked at before
    the first is replaced: if one is refused, the model is as it was. Then each dense weight is freed when its layer is
    replaced.

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
        TypeError: ``model`` is no module, or is itself a linear layer, which cannot be replaced in place.
        ValueError: a weight holds NaN or infinity, group_size is not positive, or a pattern of only matches no module.
    """
    _require_module("quantize_model", model)
    if group_size < 1:
        raise ValueError(f"quantize_model: group_size must be at least 1, got {group_size}")
    if is_linear(model) and not isinstance(model, NF4Linear):
        bare, instead = ("nn.Linear", "use NF4Linear.from_linear(linear)")
        if is_conv1d(model):
            bare, instead = ("Conv1D", "put it into a module")
        raise TypeError(f"quantize_model: a bare {bare} cannot be replaced in place; {instead}")
    skip, only = as_patterns(skip), None if only is None else as_patterns(only)
    candidates, left_alone, notes = choose(model, skip, only)
    for candidate in candidates:
        _require_finite(candidate)
        for parent, attribute, _ in candidate.places:
            setattr(parent, attribute, candidate.module)  # as it is: a parent that refuses says so before any change
    before, _ = weigh(model)
    layers: list[LayerReport] = []
    replaced: dict[tuple[int, bool], NF4Linear] = {}
    candidates.reverse()
    while candidates:  # emptied as it goes: a dense weight is freed when its layer is replaced
        layers.append(_replace(model, candidates.pop(), group_size, replaced, notes))
    guard_resizing(model)
    notes += _lost_on_meta(model)
    after, dense = weigh(model)
    return QuantizeReport(tuple(layers), tuple(left_alone), tuple(notes), before, after, dense)


def dequantize_model(model: nn.Module) -> tuple[str, ...]:
    """Replace every NF4Linear of a model by the dense layer that it computes, in place; tied weights stay tied.

    The layer is an nn.Linear, or what was there before: Conv1D and FalconLinear of transformers. Below an adapter that
    was put on the NF4Linear it is an nn.Linear, for that is what the adapter took it for.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: ``model`` is no module, or is itself an NF4Linear, which cannot be replaced in place.
    """
    _require_module("dequantize_model", model)
    if isinstance(model, NF4Linear):
        raise TypeError("dequantize_model: a bare NF4Linear cannot be replaced in place; use its to_linear()")
    dense: dict[tuple[int, bool], nn.Module] = {}
    weights: dict[tuple[int, bool], nn.Parameter] = {}
    names = []
    for parent, attribute, name, module in list(children(model)):
        if not isinstance(module, NF4Linear):
            continue
        key = (id(module), wants_linear(parent, attribute))
        if key not in dense:
            layer = as_it_was(module, as_linear=key[1])
            layer.weight = weights.setdefault((id(module.weight), is_conv1d(layer)), layer.weight)  # type: ignore[arg-type]
            layer.bias = module.bias
            dense[key] = layer
        setattr(parent, attribute, dense[key])
        names.append(name)
    guard_resizing(model)
    return tuple(names)


def _require_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")


def _require_finite(candidate: Candidate) -> None:
    weight = as_linear(candidate.module).weight.detach()
    if not may_look(weight) or weight.numel() == 0 or all(bool(bound.isfinite()) for bound in weight.aminmax()):
        return
    row, column = (int(i) for i in (~weight.isfinite()).nonzero()[0])
    raise ValueError(
        f"quantize_model: {candidate.name}.weight holds {weight[row, column].item()} at row {row}, column {column}; "
        "NF4 encodes finite weights only (the model was not changed)"
    )


def _untie(model: nn.Module, candidate: Candidate) -> str:
    """Part a weight from the dense one that it is; a note that says so."""
    note = f"{candidate.name}.weight was tied to {candidate.tied_to}, which stays dense: they are separate now"
    configured = untie(model, candidate.module, candidate.names)
    return f"{note}, and config.tie_word_embeddings is False" if configured else note


def _replace(
    model: nn.Module,
    candidate: Candidate,
    group_size: int,
    replaced: dict[tuple[int, bool], NF4Linear],
    notes: list[str],
) -> LayerReport:
    """Put an NF4Linear in every place of a layer. replaced: what was made before, by weight and layout."""
    linear = as_linear(candidate.module)
    layer = NF4Linear.from_linear(linear, cheapest_group_size(linear.in_features, group_size))
    remember_class(layer, candidate.module)
    key = (id(weight_of(candidate.module)), is_conv1d(candidate.module))
    if (tied := replaced.setdefault(key, layer)) is not layer:
        layer.weight, layer.scales = tied.weight, tied.scales
    if linear.bias is not None and not linear.bias.is_inference():
        layer.bias = linear.bias  # itself, not a copy: another module may hold it too
    if candidate.tied_to is not None:
        notes.append(_untie(model, candidate))
    for parent, attribute, _ in candidate.places:
        setattr(parent, attribute, layer)
    shape = (linear.out_features, linear.in_features)
    error = _relative_rms_error(linear.weight.detach(), layer)
    return LayerReport(candidate.name, shape, layer.group_size, layer.bits_per_weight, error)


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
