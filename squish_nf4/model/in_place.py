"""Why NF4Linear could not stand where a linear layer does: what somebody hung on it, and what else it is or has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from squish_nf4.model.linear_kinds import has_forward_of_linear, is_conv1d, shape_wanted, weight_of
from squish_nf4.ops import COMPUTE_DTYPES

OWN = ("weight", "bias")
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# What an nn.Linear and a Conv1D have, and what transformers notes for itself while it loads.
ATTRIBUTES = {*vars(nn.Linear(1, 1, device="meta")), "nf", "nx", "_is_hf_initialized", "_hf_tp_plan", "_hf_device_mesh"}
METHODS = ("forward", "reset_parameters", "extra_repr")  # of a subclass; has_forward_of_linear looks at the first
SPECIAL = ("__call__", "__getattr__", "__getattribute__", "__setattr__")


def reason_in_place(module: nn.Module, places: Iterable[tuple[nn.Module, str, str]]) -> str | None:
    """Why the modules that hold a layer, or the layer itself, would not get along with an NF4Linear in its place."""
    for parent, attribute, _ in places:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight itself"
        if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
            return "the fast path of nn.TransformerEncoderLayer reads its weight itself"
        of_adapters = getattr(parent, "use_dora", None)  # of PEFT; a function that is handed the layer reads it
        if attribute == "base_layer" and isinstance(of_adapters, dict) and any(of_adapters.values()):
            return "DoRA reads its weight itself"
    return _reason_in_layer(module)


def _reason_in_layer(module: nn.Module) -> str | None:
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "it is not initialized yet: run the model once first"
    weight = weight_of(module)
    if parametrize.is_parametrized(module) or weight is None:
        return "its weight is parametrized"
    if not has_forward_of_linear(module):
        return f"{type(module).__name__} has a forward of its own"
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "it has hooks"
    if any(getattr(weight, hooks, None) for hooks in TENSOR_HOOKS):
        return "its weight has hooks"
    if extra := [*module._modules, *module._buffers, *(name for name in module._parameters if name not in OWN)]:
        return f"it holds more than a weight and a bias: {', '.join(sorted(extra))}"
    if own := {*_names_of_class(module), *vars(module)} - ATTRIBUTES:
        return f"{type(module).__name__} has what nn.Linear has not: {', '.join(sorted(own))}"
    return _reason_in_weight(module, weight)


def _reason_in_weight(module: nn.Module, weight: Tensor) -> str | None:
    if type(weight) not in (nn.Parameter, FakeTensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.layout != torch.strided:
        return f"its weight is {weight.layout}"
    if weight.dtype not in COMPUTE_DTYPES:
        return f"its weight is {weight.dtype}; float32, bfloat16 and float16 are computed"
    if tuple(weight.shape) != (wanted := shape_wanted(module)):
        return f"its weight has shape {tuple(weight.shape)}, and the layer says that it is {wanted}"
    bias = module._parameters.get("bias")
    if bias is not None and tuple(bias.shape) != wanted[is_conv1d(module) :][:1]:
        return f"its bias has shape {tuple(bias.shape)}"
    return None


def _names_of_class(module: nn.Module) -> Iterator[str]:
    """What a subclass of nn.Linear defines that somebody may ask the layer for."""
    if is_conv1d(module):
        return
    for base in type(module).__mro__[: type(module).__mro__.index(nn.Linear)]:
        yield from (name for name in vars(base) if not name.startswith("__") and name not in METHODS)
        yield from (name for name in SPECIAL if name in vars(base))
