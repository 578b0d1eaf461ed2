"""Tensors through memory stretch by stretch: several threads read and encode ahead, one writes in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from squish_nf4.checkpoint.conversion.budget import Budget
from squish_nf4.checkpoint.conversion.devices import CPU
from squish_nf4.checkpoint.conversion.encode import EncodedRows, KeptValues, Survey, encode_rows, error_of_blocks
from squish_nf4.checkpoint.conversion.plan import INT64, ConvertPlan, Planned, Stretch, decide
from squish_nf4.checkpoint.conversion.report import TensorReport
from squish_nf4.checkpoint.directory.npy_writer import TensorFiles
from squish_nf4.checkpoint.messages import Progress
from squish_nf4.checkpoint.source.shards import read_values
from squish_nf4.checkpoint.values import Array, in_dtype, smallest_dtype, to_numpy

T = TypeVar("T")
Look = TypeVar("Look", EncodedRows, KeptValues)


@dataclass(frozen=True)
class Workers:
    """The threads that read and encode, how much of that the memory allows, and where they quantize."""

    pool: Executor
    budget: Budget
    device: torch.device = CPU

    def stretches(self, planned: Planned) -> list[Stretch]:
        return planned.stretches(self.budget.stretch)

    def in_order(self, tasks: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
        """The results of the tasks in their order. So many as the budget allows are under way or waiting to be used.

        What a task raises is raised when its turn comes. Left early, it gives up the tasks that have not begun.
        """
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                if len(waiting) == self.budget.ahead:
                    yield waiting.popleft().result()
                waiting.append(self.pool.submit(task))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# --- what a thread does with one stretch ------------------------------------------------------------------------------


def look_at(device: torch.device, planned: Planned, stretch: Stretch) -> EncodedRows | KeptValues:
    """Encodes the stretch if its tensor is to go to NF4, else asks which dtype keeps it."""
    if planned.group_size is None:
        return look_at_kept(planned, stretch)
    return encode_stretch(device, planned, planned.group_size, stretch)


def encode_stretch(device: torch.device, planned: Planned, group_size: int, stretch: Stretch) -> EncodedRows:
    w = read_values(planned.entry, *stretch).view(-1, planned.columns)
    return encode_rows(planned.entry.name, stretch[0] // planned.columns, w, group_size, planned.limits, device)


def survey_stretch(device: torch.device, planned: Planned, group_size: int, stretch: Stretch) -> Survey:
    return encode_stretch(device, planned, group_size, stretch).survey


def look_at_kept(planned: Planned, stretch: Stretch) -> KeptValues:
    values = to_numpy(read_values(planned.entry, *stretch))
    return KeptValues(smallest_dtype(values), bool(np.isfinite(values).all()))


def read_kept(planned: Planned, stretch: Stretch) -> Array:
    return in_dtype(to_numpy(read_values(planned.entry, *stretch)), planned.kept_as)


# --- whole tensors ----------------------------------------------------------------------------------------------------


def stream(
    plan: Sequence[Planned],
    workers: Workers,
    new_files: Callable[[str], TensorFiles],
    announce: Callable[[Planned, int], None],
) -> Generator[tuple[TensorReport, TensorFiles], None, None]:
    """Writes the tensors of a plan. Each comes with its report and its files, which wait for their names.

    Args:
        new_files: makes the files of a key.
        announce: called with the bytes that were read of a tensor as each stretch of it is waited for.
    """
    look = partial(look_at, workers.device)
    tasks = (partial(look, planned, stretch) for planned in plan for stretch in workers.stretches(planned))
    with closing(workers.in_order(tasks)) as looks:
        for planned in plan:
            files = new_files(planned.key)
            try:
                report = write(planned, announced(planned, looks, workers, announce), files, workers)
            except BaseException:
                files.discard()
                raise
            yield report, files


def announced(
    planned: Planned,
    looks: Iterator[EncodedRows | KeptValues],
    workers: Workers,
    announce: Callable[[Planned, int], None],
) -> Iterator[EncodedRows | KeptValues]:
    """The looks at the stretches of one tensor, which are the next ones."""
    for first, _ in workers.stretches(planned):
        announce(planned, first * planned.entry.dtype.itemsize)
        yield from islice(looks, 1)


def write(
    planned: Planned, looks: Iterator[EncodedRows | KeptValues], files: TensorFiles, workers: Workers
) -> TensorReport:
    """Writes one tensor. If a value keeps it from NF4, what was written of that is taken back."""
    squares: list[tuple[float, float]] = []
    if planned.group_size is None:
        decided = decide(planned, (), lambda _: all_of(KeptValues, looks))
    else:
        surveys, squares = write_nf4(planned, planned.group_size, all_of(EncodedRows, looks), files)
        decided = decide(planned, surveys, partial(look_at_all_kept, workers))
    if decided.group_size is None:
        files.discard()
        write_kept(decided, files, workers)
    return TensorReport.of(decided, error_of_blocks(squares), files.finish())


def all_of(kind: type[Look], looks: Iterable[object]) -> Iterator[Look]:
    """Looks that are all of one kind, as look_at gives them of one tensor."""
    for look in looks:
        if not isinstance(look, kind):
            raise TypeError(f"a stretch gave {type(look).__name__}; {kind.__name__} is wanted")
        yield look


def write_nf4(
    planned: Planned, group_size: int, rows: Iterable[EncodedRows], files: TensorFiles
) -> tuple[list[Survey], list[tuple[float, float]]]:
    """Writes encoded rows, up to the first that NF4 cannot take. Returns the surveys and the squares of all."""
    for suffix, (dtype, shape) in planned.nf4_arrays(group_size).items():
        files.open(suffix, dtype, shape, may_compress=suffix == "__s_nf4")
    files.write("__shape", shape_of(planned))
    surveys: list[Survey] = []
    squares: list[tuple[float, float]] = []
    goes_on = True
    for some in rows:
        if some.packed is None or some.scales is None:
            goes_on = False
        elif goes_on:
            files.write("__nf4", some.packed)
            files.write("__s_nf4", some.scales)
        surveys.append(some.survey)
        squares += some.squares
    return surveys, squares


def look_at_all_kept(workers: Workers, planned: Planned) -> Iterator[KeptValues]:
    return workers.in_order(partial(look_at_kept, planned, stretch) for stretch in workers.stretches(planned))


def write_kept(planned: Planned, files: TensorFiles, workers: Workers) -> None:
    """Reads the values, which were looked at before, once more to write them."""
    for suffix, (dtype, shape) in planned.kept_arrays().items():
        files.open(suffix, dtype, shape, may_compress=suffix == "__pt")
    files.write("__shape", shape_of(planned))
    tasks = [partial(read_kept, planned, stretch) for stretch in workers.stretches(planned)]
    for values in workers.in_order(tasks) if len(tasks) > 1 else [tasks[0]()]:
        files.write("__pt", values)


def shape_of(planned: Planned) -> Array:
    return np.array(planned.entry.shape, dtype=INT64)


# --- without writing --------------------------------------------------------------------------------------------------


def look_at_values(plan: ConvertPlan, workers: Workers, progress: Callable[[Progress], None]) -> ConvertPlan:
    """The plan with every tensor decided: the ones that are kept after all, and the dtypes of all that are kept.

    Raises:
        ValueError: a weight that would be quantized is not finite.
    """
    decided: dict[str, Planned] = {}
    done = 0
    for planned in plan.tensors:
        progress(Progress(planned.entry.name, done, plan.source.nbytes))
        if planned.tied_to is None:
            decided[planned.entry.name] = decide(planned, surveys(planned, workers), partial(look_at_all_kept, workers))
        else:
            owner = decided[planned.tied_to]
            decided[planned.entry.name] = replace(owner, entry=planned.entry, tied_to=planned.tied_to)
        done += planned.entry.nbytes
    return replace(plan, tensors=tuple(decided.values()))


def surveys(planned: Planned, workers: Workers) -> Iterator[Survey]:
    if planned.group_size is not None:
        look = partial(survey_stretch, workers.device, planned, planned.group_size)
        yield from workers.in_order(partial(look, stretch) for stretch in workers.stretches(planned))
