"""NF4Packer: quantization as a module, for pipelines and for TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from squish_nf4.ops import refuse_non_finite


class NF4Packer(nn.Module):
    """A module that packs weight matrices; it holds no parameters and takes no part in autograd.

    Args:
        group_size: neighbouring columns that share a scale.

    Raises:
        ValueError: group_size is not positive.
    """

    __constants__ = ("group_size",)

    def __init__(self, group_size: int = 64) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"NF4Packer: group_size must be at least 1, got {group_size}")
        self.group_size = group_size

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) floating point -> packed (n, d/2) uint8 and scales (n, d/group_size) float32, without grad.

        Raises as squish_nf4.quantize_nf4 does. In TorchScript a non-finite group is not refused: its scale is NaN.
        """
        packed, scales = torch.ops.squish.quantize_nf4(w, self.group_size)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            refuse_non_finite("NF4Packer: w", w, scales)
        return packed, scales

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"
