"""Timing that holds on a noisy machine: the candidates take turns in one process, and medians are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

import squish_nf4
from squish_nf4 import _C
from squish_nf4.doctor.examine import cpu_model_and_features

Call = Callable[[int], object]  # gets the number of the call, so that it can rotate over copies

FEWEST_ROUNDS = 5
BLOCK = 1e-3  # seconds of repeated calls that one measurement of a hot call takes
SLOW = 20e-3  # from here on it makes no difference what the threads did just before
VERY_SLOW = 50e-3  # and from here on the fewest rounds have to do, so that the others get more


@dataclass(frozen=True)
class Times:
    """Seconds of one call, by candidate and round."""

    seconds: Mapping[str, tuple[float, ...]]

    def rounds(self, name: str) -> int:
        return len(self.seconds[name])

    def milliseconds(self, name: str) -> float:
        return statistics.median(self.seconds[name]) * 1e3

    def ratio(self, name: str, other: str) -> float:
        """The time of ``name`` over that of ``other``: the median of the rounds of both, each compared with itself."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=False)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def alternate(calls: Mapping[str, Call], rounds: int = 15, *, hot: bool = False, patience: float = math.inf) -> Times:
    """Let the candidates take turns, each round in another order, after a warm-up.

    A turn begins with one call that is not timed: it wakes the threads, so that nobody depends on what came before.

    Args:
        calls: by name.
        hot: a turn times a block of calls instead of one, so that what they use is in the caches.
        patience: seconds after which no further round begins, though never fewer than five are made.

    A candidate that takes very long is left out of the rounds beyond the first five.
    """
    turns = {name: _Turn(call, hot) for name, call in calls.items()}
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = 0.0
    for number in range(rounds):
        if number == FEWEST_ROUNDS:
            started = time.perf_counter()
            names = [name for name in names if not turns[name].very_slow]
        if number >= FEWEST_ROUNDS and time.perf_counter() - started >= patience:
            break
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds[name].append(turns[name].measure())
    return Times({name: tuple(values) for name, values in seconds.items()})


class _Turn:
    """One candidate: how often it has been called, and how many calls make a measurement."""

    def __init__(self, call: Call, hot: bool) -> None:
        self._call = call
        self._number = 0
        self._take(1)
        once = self._take(1)
        self.very_slow = once > VERY_SLOW
        self._warm = 0 if once > SLOW else 1
        self._block = max(1, min(1000, math.ceil(BLOCK / max(once, 1e-7)))) if hot else 1

    def measure(self) -> float:
        self._take(self._warm)
        return self._take(self._block) / self._block

    def _take(self, count: int) -> float:
        first, call = self._number, self._call
        self._number += count
        start = time.perf_counter()
        for number in range(first, self._number):
            call(number)
        return time.perf_counter() - start


def machine() -> str:
    """The processor, as a figure has to name it."""
    return cpu_model_and_features()[0]


def conditions() -> str:
    """What a figure has to say about where it was measured."""
    return (
        f"{machine()}, {torch.get_num_threads()} threads, CPU path {_C.cpu_isa()}, "
        f"squish_nf4 {squish_nf4.__version__}, torch {torch.__version__}"
    )


def rotating(copies: Iterable[Callable[[], object]]) -> Call:
    """A call that takes the copies in turn: cold, if they are more than the caches hold."""
    calls = tuple(copies)
    count = len(calls)
    return lambda number: calls[number % count]()
