"""What becomes of each tensor: make_plan says it as far as names and headers tell, decide once its values are known."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from squish_nf4.checkpoint.conversion.encode import KeptValues, Survey, group_size_for, reason_by_header
from squish_nf4.checkpoint.conversion.journal import Journal, recall_removed
from squish_nf4.checkpoint.conversion.options import ConvertOptions, Limits
from squish_nf4.checkpoint.directory.format import keys_of
from squish_nf4.checkpoint.directory.npy_header import npy_nbytes
from squish_nf4.checkpoint.resources import peak
from squish_nf4.checkpoint.source.shard_file import Shard
from squish_nf4.checkpoint.source.shards import Entry, Source, open_source
from squish_nf4.checkpoint.source.tied import find_tied
from squish_nf4.checkpoint.values import BLOCK, WIDENED, dtype_name, rows_at_once
from squish_nf4.layout import stored_bits_per_weight

UINT8, FLOAT32, INT64 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.int64)

Stretch = tuple[int, int]  # of a tensor's values: the first, and how many; what is read at once


@dataclass(frozen=True)
class Planned:
    """What is to become of a tensor; the last four are known once its values were looked at (see decide).

    Attributes:
        entry: the tensor in the source: its name, dtype, shape and place.
        key: the start of its files' names.
        reason: why it is kept; None: it goes to NF4, if no value of it speaks against that.
        group_size: None if it is kept.
        limits: how far a weight may stand out of its row before the tensor is kept.
        tied_to: the tensor of the same values that is stored for both.
        kept_dtype: the one it is kept in; None if it goes to NF4.
        finite: False if it is kept with a NaN or infinity.
        outlier: the largest max|w| / (mean|w| + 1e-8) of a row; None if nobody looked for it.
        nf4_bytes: what its files would take in NF4, if a large weight keeps it from that.
    """

    entry: Entry
    key: str
    reason: str | None
    group_size: int | None
    limits: Limits
    tied_to: str | None = None
    kept_dtype: np.dtype[np.generic] | None = None
    finite: bool = True
    outlier: float | None = None
    nf4_bytes: int | None = None

    @property
    def rows(self) -> int:
        """The product of the leading dimensions."""
        return math.prod(self.entry.shape[:-1])

    @property
    def columns(self) -> int:
        """The last dimension."""
        return self.entry.shape[-1]

    @property
    def kept_as(self) -> np.dtype[np.generic]:
        """The dtype it is kept in; the widest that it can be while its values were not looked at."""
        return self.kept_dtype or widest_kept(self.entry)

    def nf4_arrays(self, group_size: int) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
        """The dtype and shape of each array that it is in NF4, by suffix."""
        return {
            "__nf4": (UINT8, (self.rows, self.columns // 2)),
            "__s_nf4": (FLOAT32, (self.rows, self.columns // group_size)),
            "__shape": (INT64, (len(self.entry.shape),)),
        }

    def kept_arrays(self) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
        """The dtype and shape of each array that it is when it is kept, by suffix."""
        return {"__pt": (self.kept_as, self.entry.shape), "__shape": (INT64, (len(self.entry.shape),))}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its files, not compressed; the most that a tensor takes whose kept_dtype is not known."""
        if self.tied_to is not None:
            return 0
        return nbytes_of(self.nf4_arrays(self.group_size) if self.group_size else self.kept_arrays())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the values, scales included, file headers not; 0 if nothing is stored."""
        if self.tied_to is not None or not self.entry.numel:
            return 0.0
        return stored_bits_per_weight(self.columns, self.group_size, self.kept_as.itemsize)

    def stretches(self, longest: int) -> list[Stretch]:
        """The stretches it is read in, at most so many values each; one of none if it is empty.

        In NF4 they hold whole rows, as many as encode.py wants; longest is enough for that (budget.py).
        """
        unit = BLOCK if self.reason else self.columns * rows_at_once(self.columns, BLOCK)
        step = max(1, longest // unit) * unit
        return [(first, min(step, self.entry.numel - first)) for first in range(0, max(1, self.entry.numel), step)]


def nbytes_of(arrays: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]) -> int:
    """Bytes of the .npy files of some arrays."""
    return sum(npy_nbytes(dtype, shape) for dtype, shape in arrays.values())


def widest_kept(entry: Entry) -> np.dtype[np.generic]:
    """The dtype of a kept tensor that no narrower one holds."""
    if entry.dtype in WIDENED:
        return np.dtype(np.float32 if entry.dtype.itemsize > 1 or "e8m0" in dtype_name(entry.dtype) else np.float16)
    return np.dtype(dtype_name(entry.dtype))


def decide(planned: Planned, surveys: Iterable[Survey], look: Callable[[Planned], Iterable[KeptValues]]) -> Planned:
    """What becomes of a tensor, now that its values are looked at: one rule for converting and for a dry run.

    Args:
        surveys: what its stretches say about quantizing it, in their order; used if it is to go to NF4.
        look: looks at the values of a tensor that is kept, stretch by stretch; called if it is, maybe after all.
    """
    if (group_size := planned.group_size) is not None:
        survey = Survey()
        for found in surveys:
            survey = survey.joined(found)
        outlier = None if survey.beyond_float32 else survey.outlier[0]
        reason = survey.reason_to_keep(planned.limits)
        planned = replace(planned, reason=reason, outlier=outlier)
        if reason is None:
            return planned
        would_take = None if outlier is None else nbytes_of(planned.nf4_arrays(group_size))
        planned = replace(planned, group_size=None, nf4_bytes=would_take)
    looks = list(look(planned))
    widest = max((found.dtype for found in looks), key=lambda dtype: dtype.itemsize)
    return replace(planned, kept_dtype=widest, finite=all(found.finite for found in looks))


@dataclass(frozen=True)
class ConvertPlan:
    """A checkpoint to convert, and what is to become of each tensor.

    Attributes:
        source: the shards, their tensors, and the small files beside them.
        options: what decides which bytes are written.
        tied: of each tensor that is stored under another's name, that name.
        keys: of every name, its own, whether or not it is stored under another.
        tensors: one Planned per tensor, in the order of the source.
    """

    source: Source
    options: ConvertOptions
    tied: Mapping[str, str]
    keys: Mapping[str, str]
    tensors: Sequence[Planned]

    @property
    def manifest(self) -> dict[str, str]:
        """What manifest.json will hold: of each name, the start of its files' names."""
        return {planned.entry.name: planned.key for planned in self.tensors}

    @property
    def longest_row(self) -> int:
        """The most columns of a tensor that goes to NF4."""
        return max((planned.columns for planned in self.tensors if planned.group_size), default=1)

    @property
    def nbytes(self) -> int:
        """Bytes of all files in tensors/, not compressed."""
        return sum(planned.nbytes for planned in self.tensors)

    def bytes_taken(self, removing: bool, done: Container[str] = ()) -> int:
        """What the disk has to give: all that is written, or less if each shard is removed after it.

        done: the tensors that an earlier run has finished.
        """
        shards: dict[Shard, int] = dict.fromkeys(self.source.shards, 0)
        for planned in self.tensors:
            if planned.entry.name not in done:
                shards[planned.entry.shard] += planned.nbytes
        small = sum(file.stat().st_size for file, _ in self.source.small_files)
        # A shard that is done is gone, or goes at some time that nobody should count on.
        steps = [(written, shard.nbytes if removing and written else 0) for shard, written in shards.items()]
        return small + peak(steps)


def make_plan(src: Path, options: ConvertOptions, journal: Journal | None = None) -> ConvertPlan:
    """Reads the headers of a source, and little more.

    Args:
        src: as open_source takes it.
        journal: of the conversion that is gone on with, which may have removed shards.

    Raises:
        FileNotFoundError, ValueError: as open_source; a name that cannot be a file name, or collides with another.
    """
    folder = src if src.is_dir() else src.parent
    source = open_source(src, recall_removed(folder, journal) if journal else {})
    keys = keys_of(entry.name for entry in source.entries)
    tied = journal.header["tied"] if journal else find_tied(source.entries)
    names: defaultdict[str, list[str]] = defaultdict(list)
    for entry in source.entries:
        names[tied.get(entry.name, entry.name)].append(entry.name)
    tensors = []
    for entry in source.entries:
        owner = tied.get(entry.name, entry.name)
        # What is asked for one name of a tensor is done for the tensor.
        reasons = [reason_by_header(name, entry.dtype, entry.shape, options) for name in names[owner]]
        reason = next(filter(None, reasons), None)
        group_size = None if reason else group_size_for(entry.shape[-1], options.group_size)
        limits = options.limits(*names[owner])
        tensors.append(Planned(entry, keys[owner], reason, group_size, limits, tied.get(entry.name)))
    return ConvertPlan(source, options, tied, keys, tensors)
