"""The gradient of x: dy times the weight, through autograd, against the dense layer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.bench import DTYPES, Candidate, Options, measure, relative_error
from benchmarks.records import COLD, Case, Record
from benchmarks.suites.weights import Contender, entrants, ours, random_weight, theirs

WHAT = "gradient of x"
BATCHES = (16, 64, 256, 1024)
PEERS = ("dense torch", "bitsandbytes")  # the others have no gradient
ROWS = 16  # of the gradient, that are compared with float64


def run(options: Options) -> Iterator[Record]:
    size, threads = options.square, max(options.threads)
    torch.set_num_threads(threads)
    weight = random_weight(size, size)
    for dtype in options.dtypes:
        contenders = [ours(weight, DTYPES[dtype]), *theirs(weight, DTYPES[dtype], training=True, only=PEERS)]
        for m in options.batches or ((64,) if options.quick else BATCHES):
            case = Case("backward", WHAT, dtype, size, size, m, weight.group_size, threads, COLD)
            yield from measure(case, gradients(contenders, m, DTYPES[dtype]), options)


def gradients(contenders: list[Contender], m: int, dtype: torch.dtype) -> list[Candidate]:
    """Each contender with a graph for each copy of its weight, checked."""
    n, d = contenders[0].decoded.shape
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, d, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(m, n, generator=generator).to(dtype)

    def backward(y: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    def error(contender: Contender, dx: Tensor) -> float:
        return relative_error(dx[:ROWS], dy[:ROWS].double() @ contender.decoded.double())

    def calls_of(contender: Contender) -> list[Callable[[], Tensor]]:
        return [backward(layer(x)()) for layer in contender.layers]

    return entrants(contenders, f"the {WHAT} at M = {m} in {dtype}", m, calls_of, error)
