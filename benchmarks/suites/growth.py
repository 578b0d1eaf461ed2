"""How the time grows with n, d, M and the threads: nothing may be worse than linear, and no M slower than M + 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.bench import DTYPES, Options, measure
from benchmarks.records import COLD, Case, Record
from benchmarks.suites import codec
from benchmarks.suites.linear import compete
from benchmarks.suites.weights import Reading, ours, random_weight, theirs

SWEEP_N, SWEEP_D, SWEEP_M, SWEEP_THREADS = "n", "d", "M", "threads"  # the suites' names begin with "growth with "
FACTORS = (0.25, 0.5, 1, 2, 4)
QUICK_FACTORS = (0.5, 1)
BATCHES = (*range(1, 35), 40, 48, 56, 63, 64, 65, 96, 128, 256, 512)
QUICK_BATCHES = (1, 2, 3, 4)
DENSE = ("dense torch",)


def run(options: Options) -> Iterator[Record]:
    size = options.square
    factors = QUICK_FACTORS if options.quick else FACTORS
    options = replace(options, patience=options.patience / 2)
    dtypes = [dtype for dtype in options.dtypes if dtype != "float16"]  # which runs through the same code as float32
    many = max(options.threads)
    for dtype in dtypes:
        for factor in factors:
            yield from _linear(SWEEP_N, dtype, int(size * factor), size, 1, many, options)
            yield from _linear(SWEEP_D, dtype, size, int(size * factor), 1, many, options)
        yield from _batches(dtype, size, many, options)
        for threads in some_threads(max(os.cpu_count() or 1, many)):
            for m in (1, 64):
                yield from _linear(SWEEP_THREADS, dtype, size, size, m, threads, options)
    torch.set_num_threads(many)
    for factor in factors:
        w = torch.randn(int(size * factor), size)
        for what, candidates in ((codec.QUANTIZE, codec.quantizers), (codec.DEQUANTIZE, codec.decoders)):
            own = [candidate for candidate in candidates(w, COLD) if candidate.role == "ours"]
            case = Case(f"growth with {SWEEP_N}", what, "float32", w.size(0), w.size(1), threads=many)
            yield from measure(case, own, options)


def some_threads(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def _linear(sweep: str, dtype: str, n: int, d: int, m: int, threads: int, options: Options) -> Iterator[Record]:
    torch.set_num_threads(threads)
    weight = random_weight(n, d)
    case = Case(f"growth with {sweep}", "linear", dtype, n, d, m, weight.group_size, threads, COLD)
    yield from compete(case, [ours(weight, DTYPES[dtype])], Reading(weight), options)


def _batches(dtype: str, size: int, threads: int, options: Options) -> Iterator[Record]:
    torch.set_num_threads(threads)
    weight = random_weight(size, size)
    contenders = [ours(weight, DTYPES[dtype]), *theirs(weight, DTYPES[dtype], only=DENSE)]
    for m in options.batches or (QUICK_BATCHES if options.quick else BATCHES):
        case = Case(f"growth with {SWEEP_M}", "linear", dtype, size, size, m, weight.group_size, threads, COLD)
        yield from compete(case, contenders, None, options)
