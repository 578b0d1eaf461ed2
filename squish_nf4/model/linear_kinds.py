"""The modules that compute ``y = x W^T + b`` and that NF4Linear can stand for: nn.Linear, and two of transformers'.

They are known by name, and transformers is not imported. Conv1D (GPT-2) stores W transposed; FalconLinear is an
nn.Linear that multiplies and adds in two steps.
"""

from __future__ import annotations

from torch import Tensor, nn

from squish_nf4.nn.linear import NF4Linear

CLASS_BEFORE = "class_before_nf4"  # attribute of an NF4Linear that stands for another class than nn.Linear


def is_conv1d(module: nn.Module) -> bool:
    return _is_of_transformers(module, "Conv1D")


def is_falcon_linear(module: nn.Module) -> bool:
    return _is_of_transformers(module, "FalconLinear") and isinstance(module, nn.Linear)


def _is_of_transformers(module: nn.Module, name: str) -> bool:
    """Whether this is that class itself: a subclass may compute something else."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.split(".")[0] in ("transformers", "transformers_modules")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def has_forward_of_linear(module: nn.Module) -> bool:
    """Whether it computes what nn.Linear does: its class says so, and nobody has replaced its forward."""
    known = type(module).forward is nn.Linear.forward or is_conv1d(module) or is_falcon_linear(module)
    return known and "forward" not in vars(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module as an nn.Linear on the same memory; itself, if it is one."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:
        raise TypeError(f"{type(module).__name__} has no weight")
    rows, columns = weight.t().shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight.detach().t(), weight.requires_grad), bias  # type: ignore[assignment]
    return linear.train(module.training)


def remember_class(layer: NF4Linear, module: nn.Module) -> None:
    """Note on an NF4Linear whom it stands for; copies and pickles of it keep the note."""
    if is_conv1d(module) or is_falcon_linear(module):
        vars(layer)[CLASS_BEFORE] = type(module)


def wants_linear(parent: nn.Module, attribute: str) -> bool:
    """Whether this place is for an nn.Linear, whatever stood there before the NF4Linear that it holds.

    An adapter that was put on an NF4Linear took it for an nn.Linear, and merges as it would into one. One that was put
    on a Conv1D says ``fan_in_fan_out``.
    """
    return not getattr(parent, "fan_in_fan_out", attribute != "base_layer")


def as_it_was(layer: NF4Linear, as_linear: bool = False) -> nn.Module:
    """The dense module that an NF4Linear computes, of the class and in the layout that were there before it.

    as_linear: it is an nn.Linear, even if there was none.
    """
    linear, kind = layer.to_linear(), vars(layer).get(CLASS_BEFORE)
    if kind is None or as_linear:
        return linear
    if issubclass(kind, nn.Linear):
        linear.__class__ = kind
        return linear
    conv: nn.Module = kind.__new__(kind)
    nn.Module.__init__(conv)
    vars(conv).update(nf=layer.out_features, nx=layer.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    conv.bias = linear.bias
    return conv.train(layer.training)


def shape_wanted(module: nn.Module) -> tuple[object, ...]:
    """The shape that the weight has by what the module says of its sizes."""
    rows, columns = ("nx", "nf") if is_conv1d(module) else ("out_features", "in_features")
    return getattr(module, rows), getattr(module, columns)


def weight_of(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")
