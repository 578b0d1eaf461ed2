"""The goals as data: what is compared, with whom, in which cases, and the bound. The report says reached or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.records import COLD, HOT, OURS, Record, matching

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
NOISE = 1.05  # by which neighbouring times may differ without meaning anything


@dataclass(frozen=True)
class Found:
    """The worst value of all the cases that a goal speaks of, and which one that was."""

    value: float
    where: str


@dataclass(frozen=True)
class Goal:
    """measure: from all records. at_most: whether the bound is an upper one. unit: behind the value."""

    text: str
    bound: float
    measure: Callable[[Sequence[Record]], Found | None]
    at_most: bool = False
    unit: str = ""

    def reached(self, found: Found) -> bool:
        return found.value <= self.bound if self.at_most else found.value >= self.bound


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
    along: str, per: str | None = None, *, down: bool = False, step: int | None = None, **where: Any
) -> Measure:
    """How the time changes from one value of a field to the next: the greatest ratio.

    per: a field that the times are divided by first. down: the time of the smaller value over that of the larger.
    step: only neighbours that are so far apart.
    """

    def measure(records: Sequence[Record]) -> Found | None:
        found = []
        for series in groups(select(records, where), without=along):
            ordered = sorted(series, key=lambda record: record.field(along))
            for small, large in pairwise(ordered):
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


READ_WRITE, SAME, FRESH = "read w, write packed", "store, same memory", "store, fresh memory"
READ, DENSE, BNB, GGML, INT4 = "read of packed", "dense torch", "bitsandbytes", "ggml", "int4pack"
_QUANTIZE = {"suite": "codec", "what": "quantize", "place": COLD}
_DECODE = {"suite": "codec", "what": "dequantize"}
_LINEAR = {"suite": "linear", "candidate": "squish_nf4"}
_ONE = {**_LINEAR, "m": 1, "place": COLD, "threads": 2, "n": 4096, "d": 4096}
_SWEEP = {"suite": "growth with M", "candidate": "squish_nf4"}
_LARGE = (64, 256, 1024)

GOALS: tuple[Goal, ...] = (
    Goal(
        "quantize float32: of the read and write loop", 0.65, speed(READ_WRITE, dtype="float32", threads=1, **_QUANTIZE)
    ),
    Goal(
        "quantize bfloat16: of the read and write loop",
        0.45,
        speed(READ_WRITE, dtype="bfloat16", threads=1, **_QUANTIZE),
    ),
    Goal(
        "quantize float32, AVX2 path: of the read and write loop",
        0.40,
        speed(READ_WRITE, dtype="float32", threads=1, isa="avx2", **_QUANTIZE),
    ),
    Goal("quantize float32: times bitsandbytes", 70, speed(BNB, dtype="float32", **_QUANTIZE)),
    *(
        Goal(
            f"dequantize.out {dtype}: of the store loop",
            0.95,
            speed(SAME, dtype=dtype, place=COLD, candidate="squish_nf4 .out", **_DECODE),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    *(
        Goal(
            f"dequantize {dtype}, fresh: of the store loop into fresh memory",
            0.90,
            speed(FRESH, dtype=dtype, place=COLD, candidate="squish_nf4", **_DECODE),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ),
    Goal("dequantize 1024 x 1024, in cache: times bitsandbytes", 2.0, speed(BNB, place=HOT, **_DECODE)),
    Goal("linear float32: relative error", 1e-6, error(dtype="float32", **_LINEAR), at_most=True),
    *(
        Goal(
            f"linear {dtype}: error over that of dense torch",
            1.2,
            error_over(DENSE, dtype=dtype, **_LINEAR),
            at_most=True,
        )
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Goal(f"linear {dtype}, M = 1: of the read of its bytes", bound, speed(READ, dtype=dtype, **_ONE))
        for dtype, bound in (("bfloat16", 0.80), ("float16", 0.65), ("float32", 0.65))
    ),
    *(
        Goal(
            f"linear {dtype}, M = 1, AVX2 path: of the read of its bytes",
            bound,
            speed(READ, dtype=dtype, isa="avx2", **_ONE),
        )
        for dtype, bound in (("bfloat16", 0.70), ("float32", 0.40))
    ),
    Goal("linear bfloat16, M = 1: times bitsandbytes", 1.0, speed(BNB, dtype="bfloat16", **_ONE)),
    Goal("linear bfloat16, M = 1: times ggml", 1.0, speed(GGML, dtype="bfloat16", **_ONE)),
    *(
        Goal(
            f"linear {dtype}, M = 2 to 16: times the best of bitsandbytes, int4pack and dense torch",
            1.0,
            speed(BNB, INT4, DENSE, dtype=dtype, m=(2, 4, 8, 16), place=COLD, **_LINEAR),
        )
        for dtype in ("bfloat16", "float16", "float32")
    ),
    Goal("linear, every M: times ggml, which rounds activations to 8 bits (a stretch)", 1.0, speed(GGML, **_LINEAR)),
    Goal("linear bfloat16, M >= 64: times dense torch", 0.95, speed(DENSE, dtype="bfloat16", m=_LARGE, **_LINEAR)),
    Goal("linear float32, M >= 64: times dense torch", 1.0, speed(DENSE, dtype="float32", m=_LARGE, **_LINEAR)),
    Goal("linear: step in time from M to M + 1", 2.0, neighbours("m", step=1, **_SWEEP), at_most=True),
    Goal(
        "linear, M = 16 to 65: time of M over that of the next larger M measured",
        NOISE,
        neighbours("m", down=True, m=tuple(range(16, 66)), **_SWEEP),
        at_most=True,
    ),
    Goal("gradient of x, bfloat16: times dense torch", 0.9, speed(DENSE, suite="backward", dtype="bfloat16")),
    Goal("quantize_model: share of the bare kernel", 0.5, speed("the quantize kernel", suite="conversion")),
    Goal(
        "linear 4544 x 4544 and 2880 x 2880: time per weight over that of 4096 x 4096",
        1.15,
        per_weight((4544, 2880), **_LINEAR),
        at_most=True,
    ),
    Goal(
        "call of the op, 64 x 64, M = 1",
        5.0,
        latency(suite="overhead", what="call of a layer", candidate="squish_nf4 op"),
        at_most=True,
        unit=" us",
    ),
    Goal(
        "call of NF4Linear, 64 x 64, M = 1",
        9.0,
        latency(suite="overhead", candidate="squish_nf4 NF4Linear"),
        at_most=True,
        unit=" us",
    ),
    Goal("MiniLM bfloat16: times dense torch", 1 / 1.1, speed(DENSE, suite="model", dtype="bfloat16")),
    Goal("MiniLM bfloat16: times bitsandbytes", 1.0, speed(BNB, suite="model", dtype="bfloat16")),
    Goal("MiniLM float32: times dense torch", 1.0, speed(DENSE, suite="model", dtype="float32")),
    *(
        Goal(
            f"growth with {name}: time per {name} over that of the next smaller one",
            1.1,
            neighbours(name, per=name, suite=f"growth with {name}"),
            at_most=True,
        )
        for name in ("n", "d")
    ),
    Goal(
        "growth with M: time per M over that of the next smaller one",
        1.1,
        neighbours("m", per="m", **_SWEEP),
        at_most=True,
    ),
    Goal(
        "one more thread: time over that of one fewer",
        NOISE,
        neighbours("threads", suite="growth with threads"),
        at_most=True,
    ),
)
