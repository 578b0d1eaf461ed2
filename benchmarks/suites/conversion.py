"""quantize_model of a model against the bare quantize kernel on the same weights: what is not the kernel is Python."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import squish_nf4
from benchmarks.bench import DTYPES, Candidate, Options, measure, require_equal
from benchmarks.records import COLD, OURS, PEER, Case, Record

WHAT = "quantize_model"
NAME, KERNEL = "squish_nf4 quantize_model", "the quantize kernel alone"
LAYERS = 8
GROUP_SIZE = 64


def run(options: Options) -> Iterator[Record]:
    size, threads = options.square // 2, max(options.threads)
    torch.set_num_threads(threads)
    for dtype in options.dtypes:
        case = Case("conversion", WHAT, dtype, LAYERS * size, size, group_size=GROUP_SIZE, threads=threads, place=COLD)
        yield from measure(case, candidates(size, DTYPES[dtype]), options)


def candidates(size: int, dtype: torch.dtype) -> list[Candidate]:
    linears = [nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(LAYERS)]
    weights = [linear.weight.detach() for linear in linears]

    def whole(_: int) -> nn.Module:
        model = nn.Sequential(*linears)  # microseconds
        squish_nf4.quantize_model(model, group_size=GROUP_SIZE)
        return model

    def kernel(_: int) -> object:
        return [torch.ops.squish.quantize_nf4(weight, GROUP_SIZE) for weight in weights]

    first: squish_nf4.NF4Linear = next(whole(0).children())  # type: ignore[assignment]
    decoded = torch.ops.squish.dequantize_nf4(*torch.ops.squish.quantize_nf4(weights[0], GROUP_SIZE), GROUP_SIZE)
    error = require_equal(NAME, first.to_linear().weight.detach().to(dtype), decoded.to(dtype))
    return [Candidate(NAME, OURS, whole, error), Candidate(KERNEL, PEER, kernel, 0.0)]
