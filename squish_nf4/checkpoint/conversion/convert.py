"""A safetensors checkpoint into a squish directory, under a memory cap, resumable at any moment.

Everything that headers, names and the disk can tell is checked before the first byte is written. Nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from squish_nf4.checkpoint.conversion import recovery
from squish_nf4.checkpoint.conversion.budget import DEFAULT_MAX_RAM, share_out
from squish_nf4.checkpoint.conversion.devices import device_named
from squish_nf4.checkpoint.conversion.forms import open_journal
from squish_nf4.checkpoint.conversion.journal import header_of
from squish_nf4.checkpoint.conversion.options import ConvertOptions
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import ConvertPlan, make_plan
from squish_nf4.checkpoint.conversion.report import (
    ConvertReport,
    TensorReport,
    note_alike,
    note_other_group_sizes,
    note_unused,
    notes_on,
    sidecar,
)
from squish_nf4.checkpoint.conversion.run import refuse_links, write_tensors
from squish_nf4.checkpoint.conversion.stream import Workers, look_at_values
from squish_nf4.checkpoint.directory.format import JOURNAL, RESERVED, State, alike, holds_apart, state_of
from squish_nf4.checkpoint.directory.npy_writer import compressor
from squish_nf4.checkpoint.files import lies_inside
from squish_nf4.checkpoint.messages import Progress, listed
from squish_nf4.checkpoint.resources import DEFAULT_MIN_FREE_GB, require_room
from squish_nf4.checkpoint.source.shards import Source


class UnfinishedError(OSError):
    """The system, the disk above all, stopped a conversion that resume goes on with."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    max_ram: int = DEFAULT_MAX_RAM,
    device: str | torch.device = "cpu",
    min_free_gb: float = DEFAULT_MIN_FREE_GB,
    resume: bool = False,
    overwrite: bool = False,
    delete_source: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_tensor: Callable[[TensorReport], None] | None = None,
    **options: Any,
) -> ConvertReport:
    """Convert a checkpoint to NF4: matrices to 4 bits, everything else kept exactly, every choice reported.

    Args:
        src: a .safetensors file, or a directory of shards with or without an index; from a directory the small files
            (config, tokenizer, ...) are copied along.
        dst: a new or empty directory, outside src.
        max_ram: bytes of anonymous memory to hold at most, beyond the interpreter and the libraries.
        device: where to quantize: "cpu", "cuda" or "cuda:N". The bytes are the same. max_ram does not count what the
            CUDA runtime itself holds.
        min_free_gb: gigabytes (10^9 bytes) to leave free on the disk.
        resume: go on with an unfinished conversion in dst, if there is one.
        overwrite: replace an earlier conversion in dst, finished or not.
        delete_source: remove each shard when its output has been read back from the disk.
        progress: called as each stretch of a tensor is waited for, and once more when all are done.
        on_tensor: called when a tensor is on the disk; not of those that an earlier run had finished.
        options: what decides which bytes are written: the fields of ConvertOptions (group_size, outlier_threshold,
            passthrough, include, super_weight, ultra).

    Returns:
        A report of every tensor, with totals and notes.

    Raises:
        FileNotFoundError: src or a shard of it is missing.
        FileExistsError: dst is not empty, and what it holds is not what resume or overwrite is for.
        TypeError: there is no such option.
        ValueError: a damaged source, a device that is not there, a weight that is not finite, a name that cannot be a
            file name or collides with another, a source or an option that is not what an unfinished conversion was
            begun with.
        OSError: the disk or the GPU has no room, or fails; UnfinishedError once writing has begun. Then the text of an
            error, and of a KeyboardInterrupt, says what is left.
    """
    started = time.perf_counter()
    src, dst = Path(src), Path(dst)
    chosen = ConvertOptions.named(convert, options)
    where = device_named(device)
    refuse_inside(src, dst)
    if chosen.ultra:
        compressor()
    recovery.refuse_unless_free(dst, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        journal = None
        if state_of(dst) is State.UNFINISHED and not overwrite:
            journal = stack.enter_context(closing(open_journal(dst / JOURNAL)))
        plan = make_plan(src, chosen, journal)
        budget = share_out(max_ram, plan.longest_row, torch.get_num_threads())
        done = {fact["tensor"] for fact in journal.facts if "tensor" in fact} if journal else ()
        require_room(dst, plan.bytes_taken(delete_source, done) - recovery.bytes_freed(dst, overwrite), min_free_gb)
        workers = Workers(stack.enter_context(ThreadPoolExecutor(budget.workers)), budget, where)
        header = header_of(plan.source, chosen, plan.tied)
        if journal is not None:
            recovery.refuse_another(dst, journal, header)
            with unfinished_by_the_system(Output(dst, journal), len(plan.tensors)):
                recovery.note_other_files(dst, journal, header, delete_source=delete_source)
        if delete_source:
            refuse_links(plan.source.shards)
            refuse_values_before_removing(plan, workers)
        if journal is None:
            journal = stack.enter_context(closing(recovery.begin(dst, header, overwrite=overwrite)))
        output = Output(dst, journal)
        with unfinished_by_the_system(output, len(plan.tensors)):
            recovery.recover(output)
        with unfinished_by_the_system(output, len(plan.tensors)), unfinished_by_a_refusal(output, plan):
            refuse_alike(output, plan.keys)
            resumed = len(output.records)
            write_tensors(
                plan,
                output,
                workers,
                min_free_gb=min_free_gb,
                delete_source=delete_source,
                progress=progress or (lambda _: None),
                on_tensor=on_tensor or (lambda _: None),
            )
            copied, left = copy_small_files(plan.source, output)
            tensors = [TensorReport.from_record(name, output.records[name]) for name in plan.manifest]
            notes = [
                *plan.source.notes,
                *note_alike(plan.keys),
                *note_unused(chosen, list(plan.keys)),
                *left,
                *notes_on(tensors),
                *note_other_group_sizes(chosen.group_size, tensors),
            ]
            seconds = time.perf_counter() - started
            report = ConvertReport(src, dst, tuple(tensors), resumed, copied, tuple(notes), seconds)
            output.finish(plan.manifest, report.stats(), sidecar(report, chosen, output))
    return report


def dry_run(
    src: str | os.PathLike[str],
    *,
    max_ram: int = DEFAULT_MAX_RAM,
    device: str | torch.device = "cpu",
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> ConvertPlan:
    """What convert would do, exactly: every value is looked at, and nothing is written.

    Args:
        src, max_ram, device, progress, options: as for convert.

    Returns:
        The plan of a conversion, every tensor decided.

    Raises:
        FileNotFoundError, TypeError, ValueError: as convert would.
        OSError: the GPU fails, or has no memory left.
    """
    chosen = ConvertOptions.named(dry_run, options)
    where = device_named(device)
    plan = make_plan(Path(src), chosen)
    budget = share_out(max_ram, plan.longest_row, torch.get_num_threads())
    with ThreadPoolExecutor(budget.workers) as pool:
        return look_at_values(plan, Workers(pool, budget, where), progress or (lambda _: None))


def refuse_inside(src: Path, dst: Path) -> None:
    if src.is_dir() and lies_inside(dst, src):
        raise ValueError(f"{dst} lies inside the source {src}; convert into a directory outside it")


def refuse_values_before_removing(plan: ConvertPlan, workers: Workers) -> None:
    """A weight that is refused is found before a shard is removed: after that no other options could be tried."""
    unread = [planned for planned in plan.tensors if planned.tied_to is None and planned.entry.shard.path.exists()]
    look_at_values(replace(plan, tensors=unread), workers, lambda _: None)


def refuse_alike(output: Output, keys: Mapping[str, str]) -> None:
    """Refuses names that the output's file system takes for one."""
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
        if place.parts[0].lower() in RESERVED:
            notes.append(f"not copied: {place} (a squish directory has its own {place.parts[0].lower()})")
        elif output.copy(file, place):
            copied.append(place.as_posix())
        else:
            notes.append(f"not copied: {place} (the output has a file of its own there)")
    return tuple(copied), notes


def what_is_left(output: Output, tensors: int) -> str:
    """What is said beside the cause that stopped the writing."""
    return (
        f"{output.path} is left unfinished, with {len(output.records)} of {tensors} tensors: no reader takes it "
        "for a checkpoint"
    )


@contextmanager
def unfinished_by_the_system(output: Output, tensors: int) -> Iterator[None]:
    """An error of the system, or Control-C, says what is left, and that resume goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted. {what_is_left(output, tensors)}; resume goes on with it") from error
    except OSError as error:
        left = f"{what_is_left(output, tensors)}; resume goes on with it"
        facts = () if error.errno is None else (error.errno, f"{error.strerror}. {left}", error.filename)
        raise UnfinishedError(*facts or (f"{error}. {left}",)) from error


@contextmanager
def unfinished_by_a_refusal(output: Output, plan: ConvertPlan) -> Iterator[None]:
    """A refusal once writing has begun says what is left, and what may be done about it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError  # not a subclass: some take other arguments
        way = "when the source or the options are mended, overwrite starts anew"
        if gone := [shard.path.name for shard in plan.source.shards if not shard.path.exists()]:
            way = (
                f"it is the only copy of what the source held in {listed(gone)}: when the rest of the source is as "
                "it was, resume goes on, and when these are back, overwrite starts anew"
            )
        raise kind(f"{error}. {what_is_left(output, len(plan.tensors))}; {way}") from error
