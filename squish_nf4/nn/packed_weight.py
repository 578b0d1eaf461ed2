"""PackedWeight: packed NF4 bytes as the weight of a layer, which nobody takes for numbers.

A layer's weight has to be a Parameter, or nothing moves, shards, ties or saves it as its model does with the others.
But code that goes over parameters computes with them, and torch computes with bytes: an average of packed bytes is no
average of weights, and a zero written into them decodes to minus the scale. So every function of torch that meets a
PackedWeight comes to __torch_function__ below. What only carries bytes is done; all else, and what a later torch will
add, is refused. docs/packed-weight.md tells what was weighed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves, tree_map_only

# What returns the same bytes, or some of them: they stay packed. With another dtype it is refused.
CARRIED = frozenset(
    """
    __getitem__ alias as_strided broadcast_to byte cat chunk clone concat concatenate contiguous cpu cuda data detach
    detach_ diagonal expand expand_as flatten flip gather hsplit hstack index_select masked_select module_load
    moveaxis mT movedim narrow permute pin_memory ravel repeat reshape reshape_as roll select share_memory_ split
    split_with_sizes squeeze stack swapaxes swapdims T t take tensor_split to transpose type unbind unflatten
    unsqueeze view view_as vsplit vstack
    """.split()  # noqa: SIM905  (words are read more easily without quotes)
)
# What says something of the bytes, or hands them to another library.
READ = frozenset(
    """
    __array__ __dir__ __dlpack__ __dlpack_device__ __format__ __hash__ __len__ __repr__ _backward_hooks _base _cdata
    _grad _has_compatible_shallow_copy_type _has_symbolic_sizes_strides _is_view _post_accumulate_grad_hooks
    _typed_storage _version as_subclass data_ptr device dim dim_order dtype element_size get_device grad grad_fn
    has_names isfinite isinf isnan itemsize layout names nbytes ndim ndimension nelement numel numpy output_nr
    record_stream requires_grad retains_grad shape size storage storage_offset storage_type stride tolist
    untyped_storage
    """.split()  # noqa: SIM905
)
# What makes a tensor like it: packed, too, if it is one of bytes.
MADE = frozenset(
    "empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like zeros_like".split()  # noqa: SIM905
)
# What compares it with another tensor or takes that one's values, if both are bytes; either may come first.
WITH_ANOTHER = frozenset(
    "__eq__ __ne__ allclose copy_ data= eq equal _foreach_copy_ isclose ne set_".split()  # noqa: SIM905
)


class PackedWeight(nn.Parameter):
    """(n, c/2) uint8, two NF4 levels a byte, as a Parameter that never requires a gradient.

    Moved, copied, sliced, concatenated, compared and saved it is bytes, and what that returns is a PackedWeight again.
    Anything else is a RuntimeError that names what was asked.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False, _is_param: bool = True) -> Any:
        # _is_param: nn.Parameter leaves it on a copy, and accelerate hands on what it finds on a Parameter.
        if requires_grad:
            _warn_of_training(stacklevel=3)
        if type(data) not in (Tensor, nn.Parameter, PackedWeight):
            return nn.Parameter(data, False)  # of torch itself: a FakeTensor, a DTensor
        with DisableTorchFunctionSubclass():
            return Tensor._make_subclass(cls, data.detach(), False)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Collection[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload | OpOverloadPacket):  # below the functions that people call; ours among them
            if len(types) == 1:  # no other class than this one
                with DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            args, kwargs = tree_map_only(PackedWeight, plain, (args, kwargs))
            return func(*args, **kwargs)  # with the torch function of the others
        name = name_of(func)
        if name in ("requires_grad_", "requires_grad="):
            return _leave_untrained(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        is_first = isinstance(first, PackedWeight) or not isinstance(first, Tensor)
        asks = name[:3] == "is_" and name != "is_nonzero"  # torch.compile knows no str.startswith
        reads = is_first and (name in READ or asks or name == "grad=")
        with DisableTorchFunctionSubclass():
            if reads or (name in WITH_ANOTHER and _are_bytes(name, args, kwargs)):
                return func(*args, **kwargs)
            if is_first and (name in CARRIED or name in MADE):
                return tree_map_only(Tensor, partial(_packed_again, name), func(*args, **kwargs))
            if _sends(func):
                return func(*args, **kwargs)
        raise refusal(name)

    def __copy__(self) -> Any:
        return PackedWeight(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a Parameter of torch: files are read without this library, and a module makes it a PackedWeight again."""
        return nn.Parameter(plain(self), False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def name_of(func: Callable[..., Any]) -> str:
    """ "detach"; "shape" for the getter of a property, and "data=" for its setter."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return str(func.__self__.__name__) + ("=" if name == "__set__" else "")  # type: ignore[attr-defined]
    return str(name)


def plain(weight: Tensor) -> Tensor:
    """The same bytes as a tensor like any other."""
    with DisableTorchFunctionSubclass():
        return weight.as_subclass(Tensor)


def refusal(name: str) -> RuntimeError:
    """What a function of this name is told. No TypeError: from an operator such as *, Python would hide its text."""
    return RuntimeError(
        f"a weight of packed NF4 bytes was given to {name}, which would take the bytes for numbers; the layer's "
        "dequantize() gives the numbers, its to_linear() a dense layer, and load_state_dict takes dense weights. Code "
        "for all parameters (averages, initialization, pruning) can leave out those that are not is_floating_point()"
    )


def _are_bytes(name: str, *arguments: Any) -> bool:
    """Whether two tensors are given, or one and a storage, and no numbers and no tensors of them."""
    tensors = [part for part in tree_leaves(arguments) if isinstance(part, Tensor)]
    return (len(tensors) > 1 or name == "set_") and all(part.dtype == torch.uint8 for part in tensors)


def _sends(func: Callable[..., Any]) -> bool:
    """Whether a function of torch.distributed brings bytes to others, and adds up none."""
    return getattr(func, "__module__", "") == "torch.distributed.distributed_c10d" and "reduce" not in func.__name__


def _packed_again(name: str, result: Tensor) -> Tensor:
    if result.dtype == torch.uint8:
        return result if isinstance(result, PackedWeight) else result.as_subclass(PackedWeight)
    if name in CARRIED:
        raise refusal(f"{name} with dtype {result.dtype}")
    return result


def _leave_untrained(weight: Tensor, requires_grad: bool = True) -> Tensor:
    if requires_grad:
        _warn_of_training(stacklevel=4)
    return weight


def _warn_of_training(stacklevel: int) -> None:
    warnings.warn(
        "squish_nf4: packed NF4 weights are not trained, and requires_grad_(True) leaves them as they are; train "
        "adapters beside them (LoRA), or a layer's to_linear()",
        stacklevel=stacklevel,
    )
