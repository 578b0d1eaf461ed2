"""A safetensors checkpoint into a squish directory, one tensor in memory at a time.

Everything that headers and names can tell is checked before the first byte is written. Nothing is printed here.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squish_nf4._version import __version__
from squish_nf4.checkpoint import npy_dir
from squish_nf4.checkpoint.encode import (
    DEFAULT_OUTLIER_THRESHOLD,
    Encoded,
    check_options,
    encode,
    quantize_tensor,
)
from squish_nf4.checkpoint.lossless import dtype_name
from squish_nf4.checkpoint.names import alike, holds_apart, keys_of, listed, matching
from squish_nf4.checkpoint.npy_file import StoredFile
from squish_nf4.checkpoint.report import ConvertReport, Progress, TensorReport, notes_on
from squish_nf4.checkpoint.source import Entry, Source, open_source
from squish_nf4.layout import pick_group_size

__all__ = ["ConvertReport", "Progress", "TensorReport", "convert", "pick_group_size", "quantize_tensor"]

SIDECAR_VERSION = 1


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    group_size: int | None = None,
    outlier_threshold: float = DEFAULT_OUTLIER_THRESHOLD,
    passthrough: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to NF4: matrices to 4 bits, everything else kept exactly, every choice reported.

    Args:
        src: a .safetensors file, or a directory of shards with or without an index; from a directory the small files
            (config, tokenizer, ...) are copied along.
        dst: a new or empty directory, outside src.
        group_size: for the tensors whose columns it divides; the others, and all if it is None, take pick_group_size.
        outlier_threshold: a tensor is kept if in any row max|w| / (mean|w| + 1e-8) exceeds this; math.inf for never.
        passthrough: names, parts of names or globs of tensors to keep.
        progress: called as each tensor begins, and once more when all are done.

    Returns:
        A report of every tensor, with totals and notes.

    Raises:
        FileNotFoundError: src or a shard of it is missing.
        FileExistsError: dst is not empty.
        ValueError: a damaged source, a weight that is not finite, a name that cannot be a file name or collides with
            another. Once writing has begun, the text says what is left (also of an OSError or a KeyboardInterrupt).
    """
    started = time.perf_counter()
    check_options(group_size, outlier_threshold, passthrough)
    src, dst = Path(src), Path(dst)
    refuse_inside(src, dst)
    npy_dir.refuse_unless_empty(dst)
    source = open_source(src)
    keys = keys_of(entry.name for entry in source.entries)

    npy_dir.create(dst)
    with saying_what_is_left(dst):
        notes = source.notes + note_alike(dst, keys) + note_unused(passthrough, keys)
        tensors: list[TensorReport] = []
        records: dict[str, Any] = {}
        for entry, tensor in with_progress(source, progress):
            fitting = group_size if group_size and entry.shape and entry.shape[-1] % group_size == 0 else None
            encoded = encode(entry.name, tensor, fitting, outlier_threshold, passthrough)
            files = npy_dir.write_tensor(dst, keys[entry.name], encoded.arrays)
            tensors.append(report_on(entry, encoded, files))
            records[entry.name] = record_of(tensors[-1], files)
        copied, left = copy_small_files(source, dst)
        notes += left + notes_on(tensors) + note_other_group_sizes(group_size, tensors)
        report = ConvertReport(src, dst, tuple(tensors), copied, tuple(notes), time.perf_counter() - started)
        npy_dir.finish(dst, keys, report.stats(), sidecar(records, group_size, outlier_threshold, passthrough))
    return report


def refuse_inside(src: Path, dst: Path) -> None:
    if src.is_dir() and dst.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{dst} lies inside the source {src}; convert into a directory outside it")


@contextmanager
def saying_what_is_left(dst: Path) -> Iterator[None]:
    """What stops the writing says, beside its cause, what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted. {npy_dir.describe_unfinished(dst)}") from error
    except OSError as error:
        text = f"{error.strerror or error}. {npy_dir.describe_unfinished(dst)}"
        raise OSError(error.errno, text, error.filename) from error
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError  # not a subclass: some take other arguments
        raise kind(f"{error}. {npy_dir.describe_unfinished(dst)}") from error


def with_progress(source: Source, progress: Callable[[Progress], None] | None) -> Iterator[tuple[Entry, Any]]:
    """The source's tensors, announced one by one."""
    announce = progress or (lambda _: None)
    total, done = source.nbytes, 0
    for entry, tensor in source.tensors():
        announce(Progress(entry.name, done, total))
        yield entry, tensor
        done += entry.nbytes
    announce(Progress(source.entries[-1].name, total, total))


def note_alike(dst: Path, keys: Mapping[str, str]) -> list[str]:
    """Names that a case-insensitive file system takes for one: refused where that is so, noted where it is not."""
    groups = alike(keys)
    for names in groups:
        if not holds_apart(dst / npy_dir.TENSORS, [keys[name] for name in names]):
            raise ValueError(
                f"the names of tensors {listed(names)} differ only by case or Unicode form, and {dst} is on a file "
                "system that would keep one file for them; convert on one that tells them apart, or rename them"
            )
    return [
        f"names that differ only by case or Unicode form: {listed(names)}; a copy of the directory to a file system "
        "that ignores the difference (the usual on macOS and Windows) would lose a tensor"
        for names in groups
    ]


def note_unused(passthrough: Sequence[str], names: Mapping[str, str]) -> list[str]:
    used = {pattern for name in names for pattern in matching(name, passthrough)}
    return [f"passthrough {pattern!r} is part of no tensor's name" for pattern in passthrough if pattern not in used]


def note_other_group_sizes(group_size: int | None, tensors: Sequence[TensorReport]) -> list[str]:
    others = [t.name for t in tensors if group_size and t.kind == "nf4" and t.group_size != group_size]
    return (
        [f"quantized in groups of another size, for {group_size} does not divide their columns: {listed(others)}"]
        if others
        else []
    )


def copy_small_files(source: Source, dst: Path) -> tuple[tuple[str, ...], list[str]]:
    """(the files copied, notes on those whose names the squish directory needs)."""
    copied: list[str] = []
    notes: list[str] = []
    for file, place in source.small_files:
        if place.parts[0].lower() in npy_dir.RESERVED:
            notes.append(f"not copied: {place} (a squish directory has its own {place.parts[0].lower()})")
            continue
        (dst / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, dst / place)
        copied.append(place.as_posix())
    return tuple(copied), notes


def report_on(entry: Entry, encoded: Encoded, files: Sequence[StoredFile]) -> TensorReport:
    return TensorReport(
        name=entry.name,
        kind=encoded.kind,
        reason=encoded.reason,
        source_dtype=dtype_name(entry.dtype),
        stored_dtype=encoded.stored_dtype,
        shape=entry.shape,
        group_size=encoded.group_size,
        bits_per_weight=encoded.bits_per_weight,
        bytes_in=entry.nbytes,
        bytes_out=sum(file.nbytes for file in files),
        relative_error=encoded.relative_error,
        finite=encoded.finite,
    )


def record_of(tensor: TensorReport, files: Sequence[StoredFile]) -> dict[str, Any]:
    """A tensor's entry in squish_nf4.json."""
    return {
        "kind": tensor.kind,
        "reason": tensor.reason,
        "source_dtype": tensor.source_dtype,
        "shape": tensor.shape,
        "group_size": tensor.group_size,
        "relative_error": tensor.relative_error,
        "files": {file.name: {"bytes": file.nbytes, "sha256": file.sha256} for file in files},
    }


def sidecar(
    records: Mapping[str, Any], group_size: int | None, outlier_threshold: float, passthrough: Sequence[str]
) -> dict[str, Any]:
    """squish_nf4.json: no paths and no times, so that the same source and options give the same bytes."""
    return {
        "format_version": SIDECAR_VERSION,
        "writer": f"squish_nf4 {__version__}",
        "options": {
            "group_size": group_size,
            "outlier_threshold": outlier_threshold
            if math.isfinite(outlier_threshold)
            else None,  # JSON has no infinity
            "passthrough": list(passthrough),
        },
        "tensors": records,
    }
