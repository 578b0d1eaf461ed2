"""What a peer has to offer to be compared with. Each of its methods may answer None: it does not do that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

Bound = Callable[[], Tensor]  # a layer with its activations: computes the product
Layer = Callable[[Tensor], Bound]


@dataclass(frozen=True)
class Linear:
    """A weight as a peer stores it.

    decoded: float32 (n, d), the weights it computes with. nbytes: what one call touches. copy: another in memory.
    """

    decoded: Tensor
    nbytes: int
    copy: Callable[[], Layer]


@dataclass(frozen=True)
class Codec:
    """quantize: w to whatever the peer stores. dequantize: that to (n, d)."""

    quantize: Callable[[Tensor], object]
    dequantize: Callable[[object], Tensor]


class Peer:
    """One library.

    name: as the tables call it. note: what it computes. module: what Python calls it, None if it is always there.
    install: what to type. slow: so slow in products that it takes part in a few cases only.
    """

    name: str
    note: str
    install: str = ""
    module: str | None = None
    slow = False

    def missing(self) -> bool:
        return self.module is not None and find_spec(self.module) is None

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear | None:
        """For activations of a dtype. w: float32 (n, d), weights that NF4 represents exactly."""
        return None

    def codec(self, dtype: torch.dtype, group_size: int) -> Codec | None:
        """For weights of a dtype."""
        return None


def from_module(forward: Callable[[Tensor], Tensor]) -> Layer:
    """A layer that is a plain function of the activations."""
    return lambda x: lambda: forward(x)
