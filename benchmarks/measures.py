"""What a goal can measure in the records: a speed, an error, a latency, how the time grows. The worst case counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.records import OURS, Record, matching
from squish_nf4 import _C

ISAS: tuple[str, ...] = _C.cpu_isas()


@dataclass(frozen=True)
class Found:
    """The worst value of all the cases that a goal speaks of, and which one that was."""

    value: float
    where: str


Measure = Callable[[Sequence[Record]], Found | None]


def best_path(records: Sequence[Record]) -> str:
    """The CPU path of a run that nothing held back."""
    return max((record.isa for record in records), key=ISAS.index, default=ISAS[0])


def select(records: Sequence[Record], where: dict[str, Any]) -> list[Record]:
    """Of this library, on the best path unless another is named."""
    return matching(records, **{"role": OURS, "isa": best_path(records), **where})


def worst(values: Iterator[tuple[float, Record]], at_most: bool = False) -> Found | None:
    ordered = sorted(values, key=lambda value: value[0])
    if not ordered:
        return None
    value, record = ordered[-1 if at_most else 0]
    return Found(value, name_of(record))


def name_of(record: Record) -> str:
    case = record.case
    parts = [case.what, case.dtype, f"M = {case.m}" if case.m else "", f"{case.n} x {case.d}", case.place]
    return ", ".join([*(part for part in parts if part), f"{case.threads} thread{'s' if case.threads > 1 else ''}"])


def speed(*others: str, **where: Any) -> Measure:
    """The speed relative to the fastest of the candidates whose names begin with one of these."""

    def measure(records: Sequence[Record]) -> Found | None:
        found = []
        for record in select(records, where):
            ratios = [1 / ratio for name, ratio in record.ratios.items() if name.startswith(others)]
            if ratios:
                found.append((min(ratios), record))
        return worst(iter(found))

    return measure


def latency(**where: Any) -> Measure:
    """Microseconds."""
    return lambda records: worst(((record.ms * 1e3, record) for record in select(records, where)), at_most=True)


def error(**where: Any) -> Measure:
    def measure(records: Sequence[Record]) -> Found | None:
        found = [(record.error, record) for record in select(records, where) if record.error is not None]
        return worst(iter(found), at_most=True)

    return measure


def error_over(other: str, **where: Any) -> Measure:
    """The error over that of another candidate of the same case."""

    def measure(records: Sequence[Record]) -> Found | None:
        theirs = {(record.case, record.isa): record.error for record in matching(records, candidate=other)}
        found = []
        for record in select(records, where):
            base = theirs.get((record.case, record.isa))
            if base and record.error is not None:
                found.append((record.error / base, record))
        return worst(iter(found), at_most=True)

    return measure


def neighbours(
    along: str,
    per: str | None = None,
    *,
    down: bool = False,
    step: int | None = None,
    doubled: bool = False,
    **where: Any,
) -> Measure:
    """How the time changes from one value of a field to the next: the greatest ratio.

    per: a field that the times are divided by first. down: the time of the smaller value over that of the larger.
    step: only neighbours that are so far apart. doubled: not the next value, but twice the value.
    """

    def measure(records: Sequence[Record]) -> Found | None:
        found = []
        for series in groups(select(records, where), without=along):
            ordered = sorted(series, key=lambda record: record.field(along))
            by_value = {record.field(along): record for record in ordered}
            twice = [(one, by_value[value * 2]) for value, one in by_value.items() if value * 2 in by_value]
            for small, large in twice if doubled else pairwise(ordered):
                if step is not None and large.field(along) - small.field(along) != step:
                    continue
                times = [record.ms / (record.field(per) if per else 1) for record in (small, large)]
                found.append((times[0] / times[1] if down else times[1] / times[0], small if down else large))
        return worst(iter(found), at_most=True)

    return measure


def groups(records: Sequence[Record], without: str) -> list[list[Record]]:
    """Those that agree in everything about the case but one field."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        case = record.case
        key = tuple((name, getattr(case, name)) for name in case.__dataclass_fields__ if name != without)
        found.setdefault((key, record.candidate, record.isa), []).append(record)
    return list(found.values())


def per_weight(sizes: Sequence[int], **where: Any) -> Measure:
    """The time per weight of square layers of these sizes over that of 4096 x 4096."""

    def measure(records: Sequence[Record]) -> Found | None:
        base = {_apart_from_size(record): record for record in select(records, {**where, "n": 4096, "d": 4096})}
        found = []
        for record in select(records, {**where, "n": tuple(sizes), "d": tuple(sizes)}):
            other = base.get(_apart_from_size(record))
            if other is not None:
                weights = [one.case.n * one.case.d for one in (record, other)]
                found.append(((record.ms / weights[0]) / (other.ms / weights[1]), record))
        return worst(iter(found), at_most=True)

    return measure


def _apart_from_size(record: Record) -> Any:
    case = record.case
    return case.what, case.dtype, case.m, case.threads, case.place, record.candidate
