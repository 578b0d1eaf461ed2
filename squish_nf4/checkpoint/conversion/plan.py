"""What a conversion will do with each tensor, as far as headers can tell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from squish_nf4.checkpoint.conversion.encode import group_size_for, reason_to_keep
from squish_nf4.checkpoint.conversion.fingerprint import recall_removed
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.options import Limits, Options
from squish_nf4.checkpoint.conversion.tied import find_tied
from squish_nf4.checkpoint.directory.format import keys_of
from squish_nf4.checkpoint.directory.npy_header import npy_nbytes
from squish_nf4.checkpoint.resources import peak
from squish_nf4.checkpoint.source.shards import Entry, Shard, Source, open_source
from squish_nf4.checkpoint.values import BLOCK, WIDENED, dtype_name, rows_at_once

UINT8, FLOAT32, INT64 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.int64)


@dataclass(frozen=True)
class Planned:
    """What is to become of a tensor.

    reason: why it is kept; None: it goes to NF4, if no value of it speaks against that.
    group_size: None if it is kept.
    tied_to: the tensor of the same values that is stored for both.
    kept_dtype: the one it is kept in, once its values were looked at.
    """

    entry: Entry
    key: str
    reason: str | None
    group_size: int | None
    limits: Limits
    tied_to: str | None = None
    kept_dtype: np.dtype[np.generic] | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.entry.shape[:-1])

    @property
    def columns(self) -> int:
        return self.entry.shape[-1]

    @property
    def nf4_arrays(self) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
        """By suffix, what NF4 would take; for a tensor with a group size."""
        assert self.group_size is not None
        return {
            "__nf4": (UINT8, (self.rows, self.columns // 2)),
            "__s_nf4": (FLOAT32, (self.rows, self.columns // self.group_size)),
            "__shape": (INT64, (len(self.entry.shape),)),
        }

    @property
    def nf4_nbytes(self) -> int:
        return sum(npy_nbytes(dtype, shape) for dtype, shape in self.nf4_arrays.values())

    def kept_nbytes(self, dtype: np.dtype[np.generic]) -> int:
        """Of the files of the tensor, kept in that dtype."""
        return npy_nbytes(dtype, self.entry.shape) + npy_nbytes(INT64, (len(self.entry.shape),))

    @cached_property
    def nbytes(self) -> int:
        """Of its files, not compressed; the most that a tensor takes whose kept_dtype is not known."""
        if self.tied_to is not None:
            return 0
        return self.nf4_nbytes if self.group_size else self.kept_nbytes(self.kept_dtype or widest_kept(self.entry))

    @property
    def bits_per_weight(self) -> float:
        """Of the values, scales included, file headers not; 0 if nothing is stored."""
        if self.tied_to is not None or not self.entry.numel:
            return 0.0
        kept = self.kept_dtype or widest_kept(self.entry)
        return 4 + 32 / self.group_size if self.group_size else 8.0 * kept.itemsize

    def stretches(self, tile: int) -> list[tuple[int, int]]:
        """(first value, values) of the parts it is read in, at most tile values each; one part if it is empty.

        Of NF4 they hold whole rows, as many as encode.py wants; tile is enough for that (budget.py).
        """
        unit = BLOCK if self.reason else self.columns * rows_at_once(self.columns, BLOCK)
        step = max(1, tile // unit) * unit
        return [(first, min(step, self.entry.numel - first)) for first in range(0, max(1, self.entry.numel), step)]


def widest_kept(entry: Entry) -> np.dtype[np.generic]:
    """The dtype of a kept tensor that no narrower one holds."""
    if entry.dtype in WIDENED:
        return np.dtype(np.float32 if entry.dtype.itemsize > 1 or "e8m0" in dtype_name(entry.dtype) else np.float16)
    return np.dtype(dtype_name(entry.dtype))


@dataclass(frozen=True)
class Plan:
    """A checkpoint to convert: one Planned per tensor, in the order of the source."""

    source: Source
    options: Options
    tied: Mapping[str, str]
    keys: Mapping[str, str]  # of every name, its own, whether or not it is stored under another
    tensors: Sequence[Planned]

    @property
    def manifest(self) -> dict[str, str]:
        return {planned.entry.name: planned.key for planned in self.tensors}

    @property
    def longest_row(self) -> int:
        """The most columns of a tensor that goes to NF4."""
        return max((planned.columns for planned in self.tensors if planned.group_size), default=1)

    @property
    def nbytes(self) -> int:
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


def make_plan(src: Path, options: Options, journal: Journal | None = None) -> Plan:
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
        reasons = [reason_to_keep(name, entry.dtype, entry.shape, options) for name in names[owner]]
        reason = next(filter(None, reasons), None)
        group_size = None if reason else group_size_for(entry.shape[-1], options.group_size)
        limits = options.limits(*names[owner])
        tensors.append(Planned(entry, keys[owner], reason, group_size, limits, tied.get(entry.name)))
    return Plan(source, options, tied, keys, tensors)
