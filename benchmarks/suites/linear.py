"""linear_nf4 over the number of activations M: against peers, dense torch and the read of its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.bench import DTYPES, Options, measure, places
from benchmarks.records import COLD, HOT, Case, Record
from benchmarks.suites.weights import Contender, Reading, Weight, activations, ours, products, random_weight, theirs

WHAT = "linear"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
HOT_UP_TO = 64  # with more activations it hardly matters where the weight lies
ONE_THREAD = (1, 4, 16, 256)
WITH_SLOW = (1, 64)
OTHER_SHAPES = ((4544, 4544, 64), (2880, 2880, 64), (11008, 4096, 64), (4093, 4000, 50))
OTHER_BATCHES = (1, 16, 256)


def run(options: Options) -> Iterator[Record]:
    size = options.square
    batches = options.batches or ((1, 16) if options.quick else BATCHES)
    yield from _shape(random_weight(size, size), batches, options.threads, places(options), options)
    if options.size is None and not options.quick:
        for n, d, group_size in OTHER_SHAPES:
            weight = random_weight(n, d, group_size)
            yield from _shape(weight, options.batches or OTHER_BATCHES, [max(options.threads)], (COLD,), options)


def _shape(
    weight: Weight, batches: Sequence[int], threads: Sequence[int], where: Sequence[str], options: Options
) -> Iterator[Record]:
    n, d = weight.decoded.shape
    reading = Reading(weight)
    for dtype in options.dtypes:
        contenders = [ours(weight, DTYPES[dtype]), *theirs(weight, DTYPES[dtype])]
        for count in threads:
            torch.set_num_threads(count)
            for m in batches if count == max(threads) or options.batches else [m for m in batches if m in ONE_THREAD]:
                for place in where:
                    if place == HOT and m > HOT_UP_TO:
                        continue
                    case = Case("linear", WHAT, dtype, n, d, m, weight.group_size, count, place)
                    yield from compete(case, _taking_part(contenders, case, threads), reading, options)


def _taking_part(contenders: Sequence[Contender], case: Case, threads: Sequence[int]) -> list[Contender]:
    few = case.m in WITH_SLOW and case.place == COLD and case.threads == max(threads)
    return [contender for contender in contenders if few or not contender.slow]


@torch.no_grad()
def compete(case: Case, contenders: Sequence[Contender], reading: Reading, options: Options) -> Iterator[Record]:
    candidates = products(contenders, activations(case.m, case.d, DTYPES[case.dtype]), case.place)
    yield from measure(case, [*candidates, *reading.candidates(case.place)], options)
