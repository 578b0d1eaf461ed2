"""What a conversion did, for a program to read or a command line to show: reports, notes, and squish_nf4.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from squish_nf4.checkpoint.conversion.journal import WRITER
from squish_nf4.checkpoint.conversion.options import ConvertOptions, matching
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import Planned
from squish_nf4.checkpoint.directory.format import alike
from squish_nf4.checkpoint.directory.npy_writer import StoredFile
from squish_nf4.checkpoint.messages import listed
from squish_nf4.checkpoint.values import dtype_name, dtype_named
from squish_nf4.layout import stored_bits_per_weight


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: its name in the source.
        kind: in which of the two forms it is stored.
        reason: why it was kept; None if it was quantized.
        source_dtype: as torch calls it: "bfloat16".
        stored_dtype: "nf4", or numpy's name of what it was kept in.
        shape: its shape in the source.
        group_size: None if it was kept.
        relative_error: ||w - dequantized|| / ||w||; 0 if it was kept, which is exact.
        outlier: the largest max|w| / (mean|w| + 1e-8) of a row; None if nobody looked.
        nf4_bytes: what its files would take in NF4, of a tensor that a large weight keeps from that.
        finite: False if it was kept with the NaN or infinity that it holds.
        tied_to: the tensor of the same values that is stored for both.
        files: its files; none if it is tied.
    """

    name: str
    kind: Literal["nf4", "kept"]
    reason: str | None
    source_dtype: str
    stored_dtype: str
    shape: tuple[int, ...]
    group_size: int | None
    relative_error: float
    outlier: float | None
    nf4_bytes: int | None
    finite: bool
    tied_to: str | None
    files: tuple[StoredFile, ...]

    @property
    def bytes_in(self) -> int:
        """Bytes of its values in the source."""
        return math.prod(self.shape) * dtype_named(self.source_dtype).itemsize

    @property
    def bytes_out(self) -> int:
        """Bytes of its files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_saved(self) -> int:
        """Bytes that compressing files has saved."""
        return sum(file.plain_nbytes - file.nbytes for file in self.files)

    @property
    def outlier_cost(self) -> int:
        """Bytes beyond what NF4 would take, of a tensor that a large weight keeps from that; else 0."""
        return 0 if self.nf4_bytes is None or self.tied_to else self.bytes_out - self.nf4_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the values before compression, scales included, file headers not; 0 if it is empty."""
        if 0 in self.shape:
            return 0.0
        columns = self.shape[-1] if self.shape else 1
        itemsize = 0 if self.kind == "nf4" else np.dtype(self.stored_dtype).itemsize
        return stored_bits_per_weight(columns, self.group_size, itemsize)

    @classmethod
    def of(cls, decided: Planned, relative_error: float, files: Sequence[StoredFile]) -> TensorReport:
        """The report on a tensor of which all is written. relative_error: of its values in NF4, if it is in NF4."""
        in_nf4 = decided.group_size is not None
        return cls(
            name=decided.entry.name,
            kind="nf4" if in_nf4 else "kept",
            reason=decided.reason,
            source_dtype=dtype_name(decided.entry.dtype),
            stored_dtype="nf4" if in_nf4 else str(decided.kept_as),
            shape=decided.entry.shape,
            group_size=decided.group_size,
            relative_error=relative_error if in_nf4 else 0.0,
            outlier=decided.outlier,
            nf4_bytes=decided.nf4_bytes,
            finite=decided.finite,
            tied_to=decided.tied_to,
            files=tuple(files),
        )

    def record(self) -> dict[str, Any]:
        """The tensor's entry in squish_nf4.json."""
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
    """What a conversion did.

    Attributes:
        source: what was converted.
        output: the squish directory.
        tensors: what became of each tensor, in the order of the source.
        resumed: how many of them an earlier run had finished.
        copied: small files, relative to both directories.
        notes: what a careful reader would want to know, a sentence each.
        seconds: how long it took.
    """

    source: Path
    output: Path
    tensors: tuple[TensorReport, ...]
    resumed: int
    copied: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def quantized(self) -> list[TensorReport]:
        """The tensors in NF4."""
        return [tensor for tensor in self.tensors if tensor.kind == "nf4"]

    @property
    def kept(self) -> list[TensorReport]:
        """The tensors that are stored as they were."""
        return [tensor for tensor in self.tensors if tensor.kind == "kept"]

    @property
    def bytes_in(self) -> int:
        """Bytes of all values in the source."""
        return sum(tensor.bytes_in for tensor in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of all files in tensors/."""
        return sum(tensor.bytes_out for tensor in self.tensors)

    @property
    def bytes_saved(self) -> int:
        """Bytes that compressing files has saved."""
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


SIDECAR_VERSION = 1


def sidecar(report: ConvertReport, options: ConvertOptions, output: Output) -> dict[str, Any]:
    """squish_nf4.json: no paths and no times, so that the same source and options give the same bytes."""
    return {
        "format_version": SIDECAR_VERSION,
        "writer": WRITER,
        "options": options.as_json(),
        "tensors": {tensor.name: output.records[tensor.name] for tensor in report.tensors},
        "copied": {place: output.copied[place] for place in report.copied},
    }


# --- notes: what a careful reader of a report would want to know, a sentence each -------------------------------------


def note_alike(keys: Mapping[str, str]) -> list[str]:
    """Names that a case-insensitive file system takes for one."""
    return [
        f"names that differ only by case or Unicode form: {listed(names)}; a copy of the directory to a file system "
        "that ignores the difference (the usual on macOS and Windows) would lose a tensor"
        for names in alike(keys)
    ]


def note_unused(options: ConvertOptions, names: Sequence[str]) -> list[str]:
    notes = []
    for what, patterns in (("passthrough", options.passthrough), ("include", options.include)):
        used = {pattern for name in names for pattern in matching(name, patterns)}
        notes += [f"{what} {pattern!r} is part of no tensor's name" for pattern in patterns if pattern not in used]
    return notes


def note_other_group_sizes(group_size: int | None, tensors: Sequence[TensorReport]) -> list[str]:
    others = [t.name for t in tensors if group_size and t.kind == "nf4" and t.group_size != group_size]
    return (
        [f"quantized in groups of another size, for {group_size} does not divide their columns: {listed(others)}"]
        if others
        else []
    )


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
