"""What a conversion does and did, for a program to read or a command line to show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from squish_nf4.checkpoint.lossless import dtype_named
from squish_nf4.checkpoint.names import listed


@dataclass(frozen=True)
class Progress:
    """Where a conversion is: the tensor it has begun, and the bytes of the source that are done."""

    tensor: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    kind: Literal["nf4", "kept"]
    reason: str | None  # why it was kept; None if it was quantized
    source_dtype: str  # as torch calls it: "bfloat16"
    stored_dtype: str  # "nf4", or numpy's name of what it was kept in
    shape: tuple[int, ...]
    group_size: int | None  # None if it was kept
    bits_per_weight: float  # of the stored values, scales included, file headers not; 0 if it is empty
    bytes_in: int
    bytes_out: int  # of its files
    relative_error: float  # ||w - dequantized|| / ||w||; 0 if it was kept, which is exact
    finite: bool  # False: it was kept with the NaN or infinity it holds


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    source: Path
    output: Path
    tensors: tuple[TensorReport, ...]
    copied: tuple[str, ...]  # small files, relative to both directories
    notes: tuple[str, ...]  # what a careful reader would want to know, a sentence each
    seconds: float

    @property
    def quantized(self) -> list[TensorReport]:
        return [tensor for tensor in self.tensors if tensor.kind == "nf4"]

    @property
    def kept(self) -> list[TensorReport]:
        return [tensor for tensor in self.tensors if tensor.kind == "kept"]

    @property
    def bytes_in(self) -> int:
        return sum(tensor.bytes_in for tensor in self.tensors)

    @property
    def bytes_out(self) -> int:
        return sum(tensor.bytes_out for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """How many times smaller the tensors became."""
        return self.bytes_in / self.bytes_out

    @property
    def worst(self) -> TensorReport | None:
        """The quantized tensor of the largest relative error."""
        return max(self.quantized, key=lambda tensor: tensor.relative_error, default=None)

    @property
    def mean_relative_error(self) -> float:
        """Over the quantized tensors, each counted once; 0 if there are none."""
        return sum(tensor.relative_error for tensor in self.quantized) / max(1, len(self.quantized))

    def stats(self) -> dict[str, Any]:
        """The totals, as stats.json holds them."""
        return {
            "tensors": len(self.tensors),
            "nf4": len(self.quantized),
            "kept": len(self.kept),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "ratio": round(self.ratio, 4),
            "seconds": round(self.seconds, 3),
        }


def notes_on(tensors: Sequence[TensorReport]) -> list[str]:
    """What the tensors' records say together: kept in a wider type than they had, or kept though not finite."""
    grown: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in tensors:
        if grew(tensor):
            grown[tensor.source_dtype, tensor.stored_dtype].append(tensor.name)
    notes = [
        f"kept in {stored}, for numpy has no {source}"
        f"{' and float16 would lose values' if stored == 'float32' else ''}: {listed(names)}"
        for (source, stored), names in grown.items()
    ]
    if names := [tensor.name for tensor in tensors if tensor.kind == "nf4" and takes_more_bits(tensor)]:
        notes.append(f"more bits in NF4 than before, for their rows are short; passthrough keeps them: {listed(names)}")
    if names := [tensor.name for tensor in tensors if not tensor.finite]:
        notes.append(f"kept with the NaN or infinity they hold: {listed(names)}")
    return notes


def grew(tensor: TensorReport) -> bool:
    return tensor.kind == "kept" and np.dtype(tensor.stored_dtype).itemsize > dtype_named(tensor.source_dtype).itemsize


def takes_more_bits(tensor: TensorReport) -> bool:
    return tensor.bits_per_weight > 8 * dtype_named(tensor.source_dtype).itemsize
