"""A safetensors checkpoint into a squish directory, under a memory cap, resumable at any moment.

Everything that headers, names and the disk can tell is checked before the first byte is written. Nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from squish_nf4.checkpoint.conversion import fingerprint, recovery, removal
from squish_nf4.checkpoint.conversion.budget import DEFAULT_MAX_RAM, share_out
from squish_nf4.checkpoint.conversion.dry_run import look_at_values
from squish_nf4.checkpoint.conversion.encode import quantize_tensor
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.notes import note_alike, note_other_group_sizes, note_unused, notes_on
from squish_nf4.checkpoint.conversion.options import DEFAULT_OUTLIER_THRESHOLD, Options
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import make_plan
from squish_nf4.checkpoint.conversion.report import ConvertReport, TensorReport
from squish_nf4.checkpoint.conversion.run import Run
from squish_nf4.checkpoint.conversion.unfinished import UnfinishedError, saying_what_is_left
from squish_nf4.checkpoint.directory import format as npy_dir
from squish_nf4.checkpoint.directory.format import JOURNAL, alike, holds_apart
from squish_nf4.checkpoint.directory.npy_writer import compressor
from squish_nf4.checkpoint.messages import Progress, listed
from squish_nf4.checkpoint.resources import DEFAULT_MIN_FREE_GB, require_room
from squish_nf4.checkpoint.source.shards import Source
from squish_nf4.layout import pick_group_size

__all__ = [
    "ConvertReport",
    "Progress",
    "TensorReport",
    "UnfinishedError",
    "convert",
    "pick_group_size",
    "quantize_tensor",
]

SIDECAR_VERSION = 1


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    group_size: int | None = None,
    outlier_threshold: float = DEFAULT_OUTLIER_THRESHOLD,
    passthrough: Sequence[str] = (),
    include: Sequence[str] = (),
    super_weight: bool = False,
    ultra: bool = False,
    max_ram: int = DEFAULT_MAX_RAM,
    min_free_gb: float = DEFAULT_MIN_FREE_GB,
    resume: bool = False,
    overwrite: bool = False,
    delete_source: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_tensor: Callable[[TensorReport], None] | None = None,
) -> ConvertReport:
    """Convert a checkpoint to NF4: matrices to 4 bits, everything else kept exactly, every choice reported.

    Args:
        src: a .safetensors file, or a directory of shards with or without an index; from a directory the small files
            (config, tokenizer, ...) are copied along.
        dst: a new or empty directory, outside src.
        group_size: for the tensors whose columns it divides; the others, and all if it is None, take pick_group_size.
        outlier_threshold: a tensor is kept if in any row max|w| / (mean|w| + 1e-8) exceeds this; math.inf for never.
        passthrough: names, parts of names or globs of tensors to keep, besides options.DEFAULT_PASSTHROUGH.
        include: the same, of tensors that neither those defaults nor a large weight keeps from NF4.
        super_weight: keep a tensor too if max|w| / mean|w| of a row exceeds 100.
        ultra: store scales and kept tensors compressed where that makes them smaller.
        max_ram: bytes of anonymous memory to hold at most, beyond the interpreter and the libraries.
        min_free_gb: gigabytes (10^9 bytes) to leave free on the disk.
        resume: go on with an unfinished conversion in dst, if there is one.
        overwrite: replace an earlier conversion in dst, finished or not.
        delete_source: remove each shard when its output has been read back from the disk.
        progress: called as each part of a tensor is waited for, and once more when all are done.
        on_tensor: called when a tensor is on the disk; not of those that an earlier run had finished.

    Returns:
        A report of every tensor, with totals and notes.

    Raises:
        FileNotFoundError: src or a shard of it is missing.
        FileExistsError: dst is not empty, and what it holds is not what resume or overwrite is for.
        ValueError: a damaged source, a weight that is not finite, a name that cannot be a file name or collides with
            another, a source or an option that is not what an unfinished conversion was begun with.
        OSError: the disk has no room, or fails; UnfinishedError once writing has begun. Then the text of an error, and
            of a KeyboardInterrupt, says what is left.
    """
    started = time.perf_counter()
    src, dst = Path(src), Path(dst)
    options = Options(group_size, outlier_threshold, passthrough, include, super_weight, ultra)
    refuse_inside(src, dst)
    if ultra:
        compressor()
    recovery.refuse_unless_free(dst, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        journal = None
        if npy_dir.state_of(dst) is npy_dir.State.UNFINISHED and not overwrite:
            journal = stack.enter_context(closing(Journal(dst / JOURNAL)))
        plan = make_plan(src, options, journal)
        budget = share_out(max_ram, plan.longest_row, torch.get_num_threads())
        done = {fact["tensor"] for fact in journal.facts if "tensor" in fact} if journal else ()
        require_room(dst, plan.bytes_taken(delete_source, done) - recovery.bytes_freed(dst, overwrite), min_free_gb)
        pool = stack.enter_context(ThreadPoolExecutor(budget.workers))
        if delete_source:
            removal.refuse_links(plan.source.shards)
            # A weight that is refused is found before a shard is removed: after that no other options could be tried.
            unread = [p for p in plan.tensors if p.tied_to is None and p.entry.shard.path.exists()]
            look_at_values(replace(plan, tensors=unread), pool, budget, lambda _: None)
        header = fingerprint.header_of(plan.source, options, plan.tied)
        if journal is not None:
            output = recovery.resume(dst, journal, header)
        else:
            output = stack.enter_context(closing(recovery.begin(dst, header, overwrite=overwrite)))
        with saying_what_is_left(output, len(plan.tensors)):
            refuse_alike(output, plan.keys)
            resumed = len(output.records)
            run = Run(plan, output, min_free_gb, delete_source, progress, on_tensor)
            run.write_tensors(pool, budget)
            copied, left = copy_small_files(plan.source, output)
            tensors = [TensorReport.from_record(name, output.records[name]) for name in plan.manifest]
            notes = [
                *plan.source.notes,
                *note_alike(plan.keys),
                *note_unused(options, list(plan.keys)),
                *left,
                *notes_on(tensors),
                *note_other_group_sizes(group_size, tensors),
            ]
            seconds = time.perf_counter() - started
            report = ConvertReport(src, dst, tuple(tensors), resumed, copied, tuple(notes), seconds)
            output.finish(plan.manifest, report.stats(), sidecar(report, options, output))
    return report


def refuse_inside(src: Path, dst: Path) -> None:
    if src.is_dir() and dst.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{dst} lies inside the source {src}; convert into a directory outside it")


def refuse_alike(output: Output, keys: Mapping[str, str]) -> None:
    """Names that the output's file system takes for one."""
    for names in alike(keys):
        if not holds_apart(output.folder, [keys[name] for name in names]):
            raise ValueError(
                f"the names of tensors {listed(names)} differ only by case or Unicode form, and {output.path} is on a "
                "file system that would keep one file for them; convert on one that tells them apart, or rename them"
            )


def copy_small_files(source: Source, output: Output) -> tuple[tuple[str, ...], list[str]]:
    """(the files copied, notes on those whose names are taken)."""
    copied: list[str] = []
    notes: list[str] = []
    for file, place in source.small_files:
        if place.parts[0].lower() in npy_dir.RESERVED:
            notes.append(f"not copied: {place} (a squish directory has its own {place.parts[0].lower()})")
        elif output.copy(file, place):
            copied.append(place.as_posix())
        else:
            notes.append(f"not copied: {place} (the output has a file of its own there)")
    return tuple(copied), notes


def sidecar(report: ConvertReport, options: Options, output: Output) -> dict[str, Any]:
    """squish_nf4.json: no paths and no times, so that the same source and options give the same bytes."""
    return {
        "format_version": SIDECAR_VERSION,
        "writer": fingerprint.WRITER,
        "options": options.as_json(),
        "tensors": {tensor.name: output.records[tensor.name] for tensor in report.tensors},
        "copied": {place: output.copied[place] for place in report.copied},
    }
