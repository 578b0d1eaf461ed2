"""Tensors through memory tile by tile: several threads read and encode ahead, one writes in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np

from squish_nf4.checkpoint.conversion.budget import Budget
from squish_nf4.checkpoint.conversion.encode import EncodedRows, Kind, Survey, relative_error
from squish_nf4.checkpoint.conversion.parts import KeptPart, kept_values, look_at, look_at_kept
from squish_nf4.checkpoint.conversion.pipeline import in_order
from squish_nf4.checkpoint.conversion.plan import INT64, Planned
from squish_nf4.checkpoint.directory.npy_writer import TensorFiles
from squish_nf4.checkpoint.values import Array

Part = EncodedRows | KeptPart


@dataclass(frozen=True)
class Outcome:
    """What became of a tensor, as its report has it."""

    kind: Kind
    reason: str | None
    stored_dtype: str
    relative_error: float = 0.0
    outlier: float | None = None
    finite: bool = True


def stream(
    plan: Sequence[Planned],
    budget: Budget,
    pool: Executor,
    new_files: Callable[[str], TensorFiles],
    announce: Callable[[Planned, int], None],
) -> Generator[tuple[Planned, Outcome, TensorFiles], None, None]:
    """Each tensor of the plan with what became of it and its files, which are written and wait for their names.

    Args:
        new_files: of a key.
        announce: called with the bytes that were read of a tensor as each part of it is waited for.
    """
    tasks = (partial(look_at, planned, part) for planned in plan for part in planned.stretches(budget.tile))
    with closing(in_order(pool, tasks, budget.ahead)) as results:
        for planned in plan:
            files = new_files(planned.key)
            parts = announced(planned, results, budget, announce)
            try:
                outcome = write(planned, parts, files, pool, budget)
            except BaseException:
                files.discard()
                raise
            yield planned, outcome, files


def announced(
    planned: Planned, results: Iterator[Part], budget: Budget, announce: Callable[[Planned, int], None]
) -> Iterator[Part]:
    """Those of the results that are the tensor's."""
    for first, _ in planned.stretches(budget.tile):
        announce(planned, first * planned.entry.dtype.itemsize)
        yield from islice(results, 1)


def write(planned: Planned, parts: Iterator[Part], files: TensorFiles, pool: Executor, budget: Budget) -> Outcome:
    if planned.group_size is None:
        return write_kept(planned, kept_parts(parts), files, pool, budget)
    survey, error = write_nf4(planned, parts, files)
    reason = survey.reason_to_keep(planned.limits)
    outlier = None if survey.beyond_float32 else survey.outlier[0]
    if reason is None:
        return Outcome("nf4", None, "nf4", error, outlier)
    files.discard()
    kept = replace(planned, reason=reason, group_size=None)
    looks = (partial(look_at_kept, kept, stretch) for stretch in kept.stretches(budget.tile))
    outcome = write_kept(kept, in_order(pool, looks, budget.ahead), files, pool, budget)
    return replace(outcome, outlier=outlier)


def write_nf4(planned: Planned, parts: Iterator[Part], files: TensorFiles) -> tuple[Survey, float]:
    """(what all values say, the relative error); what was written counts only if they do not say to keep the tensor."""
    for suffix, (dtype, shape) in planned.nf4_arrays.items():
        files.open(suffix, dtype, shape, may_compress=suffix == "__s_nf4")
    files.write("__shape", shape_of(planned))
    survey = Survey()
    squares: list[tuple[float, float]] = []
    for part in parts:
        assert isinstance(part, EncodedRows)
        survey = survey.joined(part.survey)
        squares += part.squares
        if part.packed is not None and part.scales is not None and survey.reason_to_keep(planned.limits) is None:
            files.write("__nf4", part.packed)
            files.write("__s_nf4", part.scales)
    return survey, relative_error(squares)


def kept_parts(parts: Iterable[Part]) -> Iterator[KeptPart]:
    for part in parts:
        assert isinstance(part, KeptPart)
        yield part


def write_kept(
    planned: Planned, parts: Iterable[KeptPart], files: TensorFiles, pool: Executor, budget: Budget
) -> Outcome:
    """Looks at all of it for the dtype that holds it, and reads it once more to write it."""
    asked = list(parts)
    dtype = widest(asked)
    files.open("__pt", dtype, planned.entry.shape, may_compress=True)
    files.open("__shape", INT64, (len(planned.entry.shape),))
    files.write("__shape", shape_of(planned))
    tasks = [partial(kept_values, planned, stretch, dtype) for stretch in planned.stretches(budget.tile)]
    for values in in_order(pool, tasks, budget.ahead) if len(tasks) > 1 else [tasks[0]()]:
        files.write("__pt", values)
    return Outcome("kept", planned.reason, str(dtype), finite=all(part.finite for part in asked))


def widest(parts: Iterable[KeptPart]) -> np.dtype[np.generic]:
    """The dtype that holds them all."""
    return max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)


def shape_of(planned: Planned) -> Array:
    return np.array(planned.entry.shape, dtype=INT64)
