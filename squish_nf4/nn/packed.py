"""What any module on packed NF4 bytes knows of them: how they are made, held, moved, cast and loaded.

What such a module computes with them is in its own file (linear.py, embedding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squish_nf4.layout import bits_per_weight, effective_group_size, padded_columns
from squish_nf4.nn.packed_weight import PackedWeight, plain
from squish_nf4.ops import COMPUTE_DTYPES, may_look, refuse_non_finite


def quantize_padded(what: str, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Encode a dense (n, d) weight, padded with zero columns to whole bytes and groups; ``what`` names it in an error.

    Outside inference mode: a layer of inference tensors could not be trained through.

    Returns:
        packed: (n, c/2) uint8. c: d, padded.
        scales: (n, c/group_size) float32.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    with torch.inference_mode(False), torch.no_grad():
        w = weight.detach()
        padding = padded_columns(w.size(1), group_size) - w.size(1)
        w = F.pad(w, (0, padding)) if padding else w
        packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
        refuse_non_finite(what, w, scales)
    return packed, scales


def dtype_to_make(kind: str, sizes: dict[str, int], group_size: int, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a new module, torch's default if none was asked for.

    Raises:
        ValueError: a size is negative, group_size is not positive.
        TypeError: dtype is not float32, bfloat16 or float16.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if group_size < 1 or min(sizes.values()) < 0:
        raise ValueError(
            f"{kind}: {' and '.join(sizes)} must not be negative and group_size must be at least 1, "
            f"got {', '.join(map(str, sizes.values()))}, {group_size}"
        )
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{kind}: dtype must be float32, bfloat16 or float16, got {dtype}")
    return dtype


def require_dense(what: str, module: object, kind: type[nn.Module]) -> None:
    """TypeError: a module is not a dense one of this kind of torch's, with a weight that can be quantized."""
    if not isinstance(module, kind) or isinstance(module, PackedModule):
        raise TypeError(f"{what}: a dense nn.{kind.__name__} is wanted, got {type(module).__name__}")
    if (dtype := module.weight.dtype) not in COMPUTE_DTYPES:
        raise TypeError(f"{what}: weight must be float32, bfloat16 or float16, got {dtype}; cast it first")


class PackedModule(nn.Module):
    """A module whose weight is packed bytes: what holds for it whatever it computes.

    The bytes move with the module, and no cast touches them. A state is checked before any of it is copied, and its
    weight may be packed or dense (it is quantized then). Where weight and scales come in states of their own (shards),
    the module refuses to run between the two.

    A subclass names this class first among its bases, so that what stands here runs before what torch's module does;
    it sets the attributes, and says its dense shape.

    Attributes:
        weight: PackedWeight (n, c/2) uint8. c: the columns, padded to whole bytes and groups.
        scales: buffer (n, c/group_size) float32, whatever the module is cast to.
        group_size: neighbouring columns that share a scale.
        dense_dtype: of the dense weight that this one stands for; follows .to(dtype) and .half().
    """

    __jit_ignored_attributes__: tuple[str, ...] = ("dense_dtype", "_missing")

    weight: Tensor
    scales: Tensor
    group_size: int
    dense_dtype: torch.dtype
    _missing = ""  # "weight" or "scales" if a state has brought the other one alone

    def _dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, without padding; all but the first dimension are the columns of a row."""
        raise NotImplementedError

    # --- the bytes ---------------------------------------------------------------------------------------------------

    def _allocate(self, group_size: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Empty bytes and scales for the dense shape, which is known by now."""
        rows, columns = self._dense_shape()[0], prod(self._dense_shape()[1:])
        self.group_size = effective_group_size(columns, group_size)
        self.dense_dtype = dtype
        stored = padded_columns(columns, self.group_size)
        self.weight = PackedWeight(torch.empty(rows, stored // 2, dtype=torch.uint8, device=device))
        scales = torch.empty(rows, stored // self.group_size, dtype=torch.float32, device=device)
        self.register_buffer("scales", scales)

    def _take(self, what: str, dense: Tensor) -> None:
        """Quantize a dense weight into the bytes and scales that are there; ``what`` names it in an error."""
        packed, scales = quantize_padded(what, dense, self.group_size)
        self.weight.copy_(packed)
        self.scales.copy_(scales)
        self._missing = ""

    def _become(self, what: str, dense: Tensor) -> None:
        """Hold a dense weight, quantized where it lies, instead of the empty bytes and scales on meta."""
        packed, self.scales = quantize_padded(what, dense, self.group_size)
        self.weight = PackedWeight(packed)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, without padding, in float32, bfloat16 or float16; float32 by default."""
        self.require_whole()
        dense: Tensor = torch.ops.squish.dequantize_nf4(self.weight, self.scales, self.group_size, dtype=dtype)
        return dense[:, : prod(self._dense_shape()[1:])].contiguous()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (nibbles, padding and scales) per logical weight."""
        return bits_per_weight(prod(self._dense_shape()[1:]), self.group_size)

    def _packed_repr(self) -> str:
        size = self.weight.nbytes + self.scales.nbytes
        return f"group_size={self.group_size}, bits_per_weight={self.bits_per_weight:.2f}, bytes={size}"

    # --- moves and casts ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the bytes and cast the rest: the scales go through ``fn`` as bytes, which no cast touches."""
        found = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).dtype
        if found != torch.uint8:  # asked before anything is changed
            raise TypeError(
                f"{type(self).__name__}: packed bytes cannot be cast to {found}; use .to(dtype), not .type(dtype)"
            )

        def keep_bytes(tensor: Tensor) -> Tensor:
            if tensor is not self.scales and tensor.dtype != torch.uint8:
                return fn(tensor)  # a bias and its gradient
            return fn(plain(tensor).contiguous().view(torch.uint8)).view(tensor.dtype)

        super()._apply(keep_bytes, recurse)  # type: ignore[no-untyped-call]
        self._keep_packed_weight()
        self.dense_dtype = self._dense_dtype_after(fn)
        return self

    def _dense_dtype_after(self, fn: Callable[[Tensor], Tensor]) -> torch.dtype:
        """The dtype that ``fn`` gives a dense weight; float64 and others, which the operator refuses, are ignored."""
        dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=self.weight.device)).dtype
        return dtype if dtype in COMPUTE_DTYPES else self.dense_dtype

    def _keep_packed_weight(self) -> None:
        """Make a PackedWeight of the plain Parameter that torch makes of ours when it moves, assigns or saves one.

        It stays the same object: layers and optimizers that share it still do.
        """
        weight = self._parameters["weight"]
        if type(weight) is nn.Parameter:
            weight.__class__ = PackedWeight

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a pickle, which holds a plain Parameter."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_packed_weight()

    # --- half a state ---------------------------------------------------------------------------------------------

    def require_whole(self) -> None:
        """RuntimeError if a state has brought one of weight and scales, and the other one is still to come."""
        if self._missing:
            came = "scales" if self._missing == "weight" else "weight"
            raise RuntimeError(
                f"{type(self).__name__}: a state has brought its {came} and not its {self._missing}, which belong "
                "together; load the rest of the state, too"
            )

    def __prepare_scriptable__(self) -> PackedModule:
        """torch.jit.script asks for what to compile. TorchScript does not know whether a half is missing."""
        self.require_whole()
        return self

    # --- loading a state ---------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load packed and scales together, or a dense weight by quantizing it; what does not fit is not copied."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            self._require_tensors(own, prefix)
            dense_dtype = self._dense_dtype_of_state(own, prefix)
            missing = self._check_and_pack_state(own, prefix)
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._keep_packed_weight()
        self._missing = missing
        if local_metadata.get("assign_to_params_buffers", False):
            self.dense_dtype = dense_dtype

    def _require_tensors(self, own: dict[str, Any], prefix: str) -> None:
        for key in (prefix + part for part in ("weight", "scales", "bias")):
            if key in own and not isinstance(own[key], Tensor):
                found = type(own[key]).__name__
                raise TypeError(f"{self._name_at(prefix)}: {key} of the state must be a tensor, got {found}")

    def _name_at(self, prefix: str) -> str:
        """What messages call this module, whose entries in a state begin with prefix."""
        kind = type(self).__name__
        return f"{kind} '{prefix.removesuffix('.')}'" if prefix else kind

    def _dense_dtype_of_state(self, own: dict[str, Any], prefix: str) -> torch.dtype:
        """The dtype of a state's dense weight, else of its bias; this module's if it has neither."""
        for part in ("weight", "bias"):
            tensor = own.get(prefix + part)
            if tensor is not None and tensor.dtype in COMPUTE_DTYPES:
                return tensor.dtype  # type: ignore[no-any-return]
        return self.dense_dtype

    def _check_and_pack_state(self, own: dict[str, Any], prefix: str) -> str:
        """Check this module's entries, raising on what misfits, and replace a dense weight by its packed form.

        Returns the half that this module still lacks after them, "weight" or "scales", or "".
        """
        name = self._name_at(prefix)
        weight, scales, bias = (own.get(prefix + part) for part in ("weight", "scales", "bias"))
        own_bias = self._parameters.get("bias")
        if bias is not None and own_bias is not None and bias.shape != own_bias.shape:
            raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}, {tuple(own_bias.shape)} is wanted")
        if weight is None and scales is None:
            return self._missing
        if weight is not None and weight.is_floating_point():
            if scales is not None:
                raise ValueError(f"{name}: the state holds scales beside a dense {weight.dtype} weight")
            wanted = self._dense_shape()
            if weight.shape != wanted:
                raise ValueError(f"{name}: dense weight has shape {tuple(weight.shape)}, {wanted} is wanted")
            packed = quantize_padded(f"{name}: weight", weight.flatten(1), self.group_size)
            own[prefix + "weight"], own[prefix + "scales"] = packed
            return ""
        found, missing = ("weight", "scales") if scales is None else ("scales", "weight")
        is_half = weight is None or scales is None
        weight, scales = self.weight if weight is None else weight, self.scales if scales is None else scales
        is_last = not is_half or self._missing == found
        self._check_packed_state(name, weight, scales, whole=is_last)
        return "" if is_last else missing

    def _check_packed_state(self, name: str, weight: Tensor, scales: Tensor, whole: bool) -> None:
        """whole: both are the state's, or the half of an earlier one."""
        if weight.dtype != torch.uint8 or scales.dtype != torch.float32:
            raise TypeError(
                f"{name}: packed weight must be uint8 and scales float32, got {weight.dtype} and {scales.dtype}"
            )
        if weight.shape == self.weight.shape and scales.shape == self.scales.shape:
            if whole:
                self._require_zero_padding(name, weight, scales)
            return
        message = (
            f"{name}: packed weight {tuple(weight.shape)} and scales {tuple(scales.shape)} do not fit; "
            f"{tuple(self.weight.shape)} and {tuple(self.scales.shape)} are wanted at group_size={self.group_size}"
        )
        if weight.dim() == scales.dim() == 2 and scales.size(1) > 0 and 2 * weight.size(1) % scales.size(1) == 0:
            message += f" (the state has group_size={2 * weight.size(1) // scales.size(1)})"
        raise ValueError(message)

    def _require_zero_padding(self, name: str, weight: Tensor, scales: Tensor) -> None:
        """Refuse weights where this module has padding: they are a wider one's, whose last columns would be lost."""
        stored, columns = 2 * weight.size(1), prod(self._dense_shape()[1:])
        if columns == stored or not may_look(weight) or weight.numel() == 0:
            return
        block = lcm(2, self.group_size)  # the padding lies in the last one
        last = weight[:, -block // 2 :], scales[:, -block // self.group_size :]
        decoded = torch.ops.squish.dequantize_nf4(*last, self.group_size)
        if bool(decoded[:, columns - stored :].any()):
            raise ValueError(
                f"{name}: the state holds weights beyond column {columns}, where this layer's padding is; "
                "it was saved from a wider layer"
            )
