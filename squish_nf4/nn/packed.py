"""The packed bytes of a weight: made from a dense one of any width, and held as a Parameter that is never trained."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squish_nf4.layout import padded_columns
from squish_nf4.ops import refuse_non_finite


def _refuse_value(method: str) -> Any:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"NF4Linear: weight holds packed NF4 bytes, and weight.{method}() would not set the weights; "
            "use reset_parameters(), NF4Linear.from_linear or load_state_dict with a dense weight"
        )

    return refuse


class PackedWeight(nn.Parameter):
    """Packed nibbles as a Parameter: they move, save and share like one, and are never trained or overwritten by value.

    A parent's requires_grad_() reaches every parameter and torch refuses it for integers; here it is ignored. A value
    written into the bytes would not be that value: zero bytes decode to minus the scale. So the methods that nn.init
    calls are refused.
    """

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a PackedWeight: torch would make a plain Parameter of it, and tied layers would each replace that one."""
        return PackedWeight, (self.data, False)

    zero_ = _refuse_value("zero_")
    fill_ = _refuse_value("fill_")
    normal_ = _refuse_value("normal_")
    uniform_ = _refuse_value("uniform_")


def quantize_padded(what: str, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Packed and scales of a dense (n, d) weight, padded with zero columns to whole bytes and groups.

    Made outside inference mode: a layer of inference tensors could not be trained through.
    """
    with torch.inference_mode(False), torch.no_grad():
        w = weight.detach()
        padding = padded_columns(w.size(1), group_size) - w.size(1)
        w = F.pad(w, (0, padding)) if padding else w
        packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
        refuse_non_finite(what, w, scales)
    return packed, scales
