"""From candidates to records: the options of a run, the check before the time, and the measuring of a case."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.records import COLD, HOT, OURS, Case, Record
from benchmarks.timing import Call, alternate, machine, rotating
from squish_nf4 import _C

T = TypeVar("T")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PACKAGES = ("squish_nf4", "torch", "numpy", "bitsandbytes", "torchao", "libggml-python")


@dataclass(frozen=True)
class Options:
    """What of the suites to run, and how long. None leaves the choice to the suite."""

    dtypes: Sequence[str] = tuple(DTYPES)
    threads: Sequence[int] = (1, 2)
    batches: Sequence[int] | None = None
    size: int | None = None
    rounds: int = 21
    patience: float = 2.0
    quick: bool = False

    @property
    def square(self) -> int:
        """Rows and columns of the matrix in the middle of things."""
        return self.size or 4096


class WrongOutputError(AssertionError):
    """A candidate does not compute what it should; its time would mean nothing."""


@dataclass(frozen=True)
class Candidate:
    name: str
    role: str
    call: Call
    error: float | None = None


def measure(case: Case, candidates: Sequence[Candidate], options: Options) -> Iterator[Record]:
    """Time the candidates of a case in turn, print a line about each, and give their records."""
    yield from measure_together([(case, candidates)], options)


def measure_together(entries: Sequence[tuple[Case, Sequence[Candidate]]], options: Options) -> Iterator[Record]:
    """The same for several cases whose times are to be compared: all candidates take turns, in the same rounds."""
    calls = {f"{i} {one.name}": one.call for i, (_, candidates) in enumerate(entries) for one in candidates}
    assert len(calls) == sum(len(candidates) for _, candidates in entries), "two candidates have one name"
    hot = {case.place == HOT for case, _ in entries}
    assert len(hot) == 1, "hot and cold cases are measured apart"
    times = alternate(calls, options.rounds, hot=hot.pop(), patience=options.patience * len(entries))
    for i, (case, candidates) in enumerate(entries):
        print(f"\n{case.what}, {case.dtype}, {title(case)}")
        ours = next((candidate.name for candidate in candidates if candidate.role == OURS), candidates[0].name)
        for candidate in candidates:
            key = f"{i} {candidate.name}"
            ratios = {other.name: times.ratio(key, f"{i} {other.name}") for other in candidates}
            print(f"  {candidate.name:<44} {times.milliseconds(key):>10.4f} ms  {ratios[ours]:>8.2f} x {ours}")
            del ratios[candidate.name]
            yield Record(
                case=case,
                candidate=candidate.name,
                role=candidate.role,
                ms=times.milliseconds(key),
                ratios=ratios,
                rounds=times.rounds(key),
                error=candidate.error,
                isa=_C.cpu_isa(),
                machine=machine(),
                versions=versions(),
                date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            )


def title(case: Case) -> str:
    m = f"M = {case.m}, " if case.m else ""
    return f"{m}{case.n} x {case.d}, group size {case.group_size}, {case.place}, {case.threads} threads"


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of what is exact."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def checked(name: str, error: float, bound: float) -> float:
    """The error, if it is within the bound."""
    if not error <= bound:  # NaN is no small error
        raise WrongOutputError(f"{name}: the relative error is {error:.3g}, at most {bound:.3g} is right; not timed")
    return error


def require_equal(name: str, found: Tensor, expected: Tensor) -> float:
    """0.0, the error of what has to be equal in every bit."""
    if found.dtype != expected.dtype or not torch.equal(found, expected):
        raise WrongOutputError(f"{name}: the result is not that of the definition; not timed")
    return 0.0


def copies_beyond_caches(nbytes: int) -> int:
    """How many copies of so many bytes to rotate over so that none is still in a cache when its turn comes."""
    return max(2, -(-4 * cache_bytes() // max(nbytes, 1)))


@cache
def cache_bytes() -> int:
    """The largest cache of the machine; 32 MiB where Linux does not say."""
    sizes = [1 << 25] if not (found := _cache_sizes()) else found
    return max(sizes)


def _cache_sizes() -> list[int]:
    units = {"K": 1 << 10, "M": 1 << 20, "": 1}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    parts = [re.fullmatch(r"(\d+)([KM]?)", text) for text in texts]
    return [int(part[1]) * units[part[2]] for part in parts if part]


def rotation(place: str, nbytes: int, first: T, another: Callable[[], T]) -> list[T]:
    """The copies to rotate over: ``first`` alone if hot, and as many more as it takes if cold."""
    count = copies_beyond_caches(nbytes) if place == COLD else 1
    return [first, *(another() for _ in range(count - 1))]


def over(copies: Sequence[T], function: Callable[[T], object]) -> Call:
    """Calls the function on the copies in turn."""
    return rotating([lambda copy=copy: function(copy) for copy in copies])  # type: ignore[misc]


def places(options: Options) -> tuple[str, ...]:
    return (COLD,) if options.quick else (COLD, HOT)


@cache
def versions() -> Mapping[str, str]:
    installed = {distribution.metadata["Name"].replace("-", "_").lower() for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name.replace("-", "_").lower() in installed}
