"""How the time grows with n, d, M and the threads: nothing may be worse than linear, and no M slower than M + 1.

What a sweep compares takes turns in the same rounds, because a machine's speed changes within a minute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.bench import DTYPES, Candidate, Options, measure, measure_together
from benchmarks.records import COLD, OURS, Case, Record
from benchmarks.suites import codec
from benchmarks.suites.weights import GROUP_SIZE, activations, ours, products, random_weight, theirs

SWEEP_N, SWEEP_D, SWEEP_M, SWEEP_THREADS = "n", "d", "M", "threads"  # the suites' names begin with "growth with "
SWEEP_SHAPE = "shape"
SHAPES = (1, 4544 / 4096, 2880 / 4096)  # rows and columns that are no powers of two, beside ones that are
FACTORS = (0.25, 0.5, 1, 2, 4)
QUICK_FACTORS = (0.5, 1)
BATCHES = (*range(1, 35), 40, 48, 56, 63, 64, 65, 96, 128, 256, 512)
QUICK_BATCHES = (1, 2, 3, 4)
DENSE = ("dense torch",)


@torch.no_grad()
def run(options: Options) -> Iterator[Record]:
    size = options.square
    factors = QUICK_FACTORS if options.quick else FACTORS
    options = replace(options, patience=options.patience / 2)
    dtypes = [dtype for dtype in options.dtypes if dtype != "float16"]  # beyond AVX2 it runs through float32's code
    many = max(options.threads)
    for dtype in dtypes:
        torch.set_num_threads(many)
        for sweep, shapes in (
            (SWEEP_N, [(int(size * factor), size) for factor in factors]),
            (SWEEP_D, [(size, int(size * factor)) for factor in factors]),
        ):
            yield from measure_together([_linear(sweep, dtype, n, d, 1, many) for n, d in shapes], options)
        for m in (1, 16):
            sides = [int(size * factor) // GROUP_SIZE * GROUP_SIZE for factor in SHAPES]
            yield from measure_together([_linear(SWEEP_SHAPE, dtype, side, side, m, many) for side in sides], options)
        yield from _batches(dtype, size, many, options)
        for threads in some_threads(max(os.cpu_count() or 1, many)):
            torch.set_num_threads(threads)
            for m in (1, 64):
                yield from measure(*_linear(SWEEP_THREADS, dtype, size, size, m, threads), options)
    torch.set_num_threads(many)
    for what, candidates in ((codec.QUANTIZE, codec.quantizers), (codec.DEQUANTIZE, codec.decoders)):
        entries = []
        for factor in factors:
            w = torch.randn(int(size * factor), size)
            own = [candidate for candidate in candidates(w, COLD) if candidate.role == OURS]
            entries.append((Case(f"growth with {SWEEP_N}", what, "float32", *w.shape, threads=many), own))
        yield from measure_together(entries, options)


def some_threads(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def _linear(sweep: str, dtype: str, n: int, d: int, m: int, threads: int) -> tuple[Case, list[Candidate]]:
    weight = random_weight(n, d)
    case = Case(f"growth with {sweep}", "linear", dtype, n, d, m, weight.group_size, threads, COLD)
    return case, products([ours(weight, DTYPES[dtype])], activations(m, d, DTYPES[dtype]), COLD)


def _batches(dtype: str, size: int, threads: int, options: Options) -> Iterator[Record]:
    weight = random_weight(size, size)
    contenders = [ours(weight, DTYPES[dtype]), *theirs(weight, DTYPES[dtype], only=DENSE)]
    entries = []
    for m in options.batches or (QUICK_BATCHES if options.quick else BATCHES):
        case = Case(f"growth with {SWEEP_M}", "linear", dtype, size, size, m, weight.group_size, threads, COLD)
        entries.append((case, products(contenders, activations(m, size, DTYPES[dtype]), COLD)))
    yield from measure_together(entries, options)
