"""Timing that holds on a noisy machine: the candidates take turns in one process, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import squish_nf4
from squish_nf4 import _C
from squish_nf4.commands.doctor import cpu_model_and_features

Candidate = Callable[[int], object]  # called with the number of the round, so that it can rotate over copies


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and the median of the ratios to the baseline of the same round."""

    milliseconds: float
    ratio: float


def alternate(candidates: Mapping[str, Candidate], baseline: str, rounds: int = 15) -> dict[str, Timing]:
    """Time each candidate once per round, in turn, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-2, rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate(number)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    base = times[baseline]
    return {
        name: Timing(
            statistics.median(values) * 1e3,
            statistics.median(value / other for value, other in zip(values, base, strict=True)),
        )
        for name, values in times.items()
    }


def print_table(title: str, timings: Mapping[str, Timing], baseline: str) -> None:
    print(f"\n{title}")
    print(f"  {'':<34} {'ms':>9}  {'time / ' + baseline:>24}")
    for name, timing in timings.items():
        print(f"  {name:<34} {timing.milliseconds:>9.3f}  {timing.ratio:>24.2f}")


def machine() -> str:
    """What a figure has to say about where it was measured."""
    model, _ = cpu_model_and_features()
    return (
        f"{model}, {torch.get_num_threads()} threads, CPU path {_C.cpu_isa()}, squish_nf4 {squish_nf4.__version__}, "
        f"torch {torch.__version__}"
    )
