"""What a conversion does and did, for a program to read or a command line to show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from squish_nf4.checkpoint.directory.npy_writer import StoredFile
from squish_nf4.checkpoint.values import dtype_named


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
    relative_error: float  # ||w - dequantized|| / ||w||; 0 if it was kept, which is exact
    outlier: float | None  # the largest max|w| / (mean|w| + 1e-8) of a row; None if nobody looked
    nf4_bytes: int | None  # what its files would take in NF4, of a tensor that a large weight keeps from that
    finite: bool  # False: it was kept with the NaN or infinity it holds
    tied_to: str | None  # the tensor of the same values that is stored for both
    files: tuple[StoredFile, ...]  # none if it is tied

    @property
    def bytes_in(self) -> int:
        return math.prod(self.shape) * dtype_named(self.source_dtype).itemsize

    @property
    def bytes_out(self) -> int:
        """Of its files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_saved(self) -> int:
        """By compressing files."""
        return sum(file.plain_nbytes - file.nbytes for file in self.files)

    @property
    def outlier_cost(self) -> int:
        """Bytes beyond what NF4 would take, of a tensor that a large weight keeps from that; else 0."""
        return 0 if self.nf4_bytes is None or self.tied_to else self.bytes_out - self.nf4_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the values before compression, scales included, file headers not; 0 if it is empty."""
        if 0 in self.shape:
            return 0.0
        return 4 + 32 / self.group_size if self.group_size else 8.0 * np.dtype(self.stored_dtype).itemsize

    def record(self) -> dict[str, Any]:
        """Its entry in squish_nf4.json."""
        fields = {field: getattr(self, field) for field in RECORDED}
        return {**fields, "shape": list(self.shape), "files": {file.name: file.record() for file in self.files}}

    @classmethod
    def from_record(cls, name: str, record: Mapping[str, Any]) -> TensorReport:
        """The inverse of record."""
        files = tuple(StoredFile.from_record(file, facts) for file, facts in record["files"].items())
        fields = {field: record[field] for field in RECORDED}
        return cls(**{**fields, "name": name, "shape": tuple(record["shape"]), "files": files})


RECORDED = (
    "kind",
    "reason",
    "source_dtype",
    "stored_dtype",
    "shape",
    "group_size",
    "relative_error",
    "outlier",
    "nf4_bytes",
    "finite",
    "tied_to",
)


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    source: Path
    output: Path
    tensors: tuple[TensorReport, ...]
    resumed: int  # of the tensors, those that an earlier run had finished
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
    def bytes_saved(self) -> int:
        """By compressing files."""
        return sum(tensor.bytes_saved for tensor in self.tensors)

    @property
    def outlier_cost(self) -> int:
        """Bytes beyond NF4 of the tensors that a large weight keeps from it."""
        return sum(tensor.outlier_cost for tensor in self.tensors)

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
