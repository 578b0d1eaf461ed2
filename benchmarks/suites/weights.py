"""The weights that the suites multiply with, and those who compete in it: this library, the peers, the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from benchmarks.bench import Candidate, WrongOutputError, checked, copies_beyond_caches, relative_error
from benchmarks.limits import limits
from benchmarks.peers import left_out_if_it_fails, peers
from benchmarks.peers.base import Bound, Layer, Linear, from_module
from benchmarks.records import COLD, LIMIT, OURS, PEER
from benchmarks.timing import Call, rotating

GROUP_SIZE = 64
NAME = "squish_nf4"
READ = "read of packed and scales"
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of our products
PEER_BOUND = 2e-2  # beyond it, a peer was called wrongly; ggml rounds activations to 8 bits
CHECKED = 1 << 20  # results of a product that are compared with float64, about
TOO_SLOW = 0.5  # seconds of one call, from which on a peer is left out
SCALES_FROM = 16  # activations, from which on a slow product takes its time for each of them


@dataclass(frozen=True)
class Weight:
    """A random matrix in NF4. decoded: float32 (n, d)."""

    packed: Tensor
    scales: Tensor
    group_size: int
    decoded: Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def copy(self) -> tuple[Tensor, Tensor]:
        return self.packed.clone(), self.scales.clone()


def random_weight(n: int, d: int, group_size: int = GROUP_SIZE) -> Weight:
    packed, scales = torch.ops.squish.quantize_nf4(
        torch.randn(n, d, generator=torch.Generator().manual_seed(5)), group_size
    )
    return Weight(packed, scales, group_size, torch.ops.squish.dequantize_nf4(packed, scales, group_size))


@dataclass
class Contender:
    """One who multiplies, with as many copies of the weight as cold calls rotate over. pace: seconds an activation."""

    name: str
    role: str
    decoded: Tensor
    layers: Sequence[Layer]
    bound: float
    slow: bool = False
    pace: float = 0.0
    turn: Iterator[int] = field(default_factory=count)  # shared, so that no two cases that take turns use one copy

    def rotating(self, calls: Sequence[Bound]) -> Call:
        return lambda _: calls[next(self.turn) % len(calls)]()

    def bind(self, x: Tensor, place: str) -> list[Bound]:
        return [layer(x) for layer in (self.layers if place == COLD else self.layers[:1])]


def ours(weight: Weight, dtype: torch.dtype, *, cold: bool = True) -> Contender:
    def another() -> Layer:
        packed, scales = weight.copy()
        return from_module(lambda x: torch.ops.squish.linear_nf4(x, packed, scales, None, weight.group_size))

    layers = _copies(Linear(weight.decoded, weight.nbytes, another), cold)
    return Contender(NAME, OURS, weight.decoded, layers, BOUNDS[dtype])


def theirs(
    weight: Weight, dtype: torch.dtype, *, cold: bool = True, training: bool = False, only: Sequence[str] | None = None
) -> list[Contender]:
    """The peers that can multiply with such a weight; ``only`` names some of them."""
    found = []
    for peer in peers():
        if only is not None and peer.name not in only:
            continue
        with left_out_if_it_fails(peer, f"{tuple(weight.decoded.shape)} in {dtype}"):
            linear = peer.linear(weight.decoded, dtype, weight.group_size, training=training)
            if linear is not None:
                layers = _copies(linear, cold)
                found.append(Contender(peer.name, PEER, linear.decoded, layers, PEER_BOUND, peer.slow))
    return found


def _copies(linear: Linear, cold: bool) -> list[Layer]:
    return [linear.copy() for _ in range(copies_beyond_caches(linear.nbytes) if cold else 1)]


def activations(m: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(m)).to(dtype)


def products(contenders: Sequence[Contender], x: Tensor, place: str) -> list[Candidate]:
    """Each contender with these activations, checked."""
    return entrants(
        contenders,
        f"M = {x.size(0)} in {x.dtype}",
        x.size(0),
        lambda contender: contender.bind(x, place),
        lambda contender, y: product_error(y, x, contender.decoded),
    )


def entrants(
    contenders: Sequence[Contender],
    case: str,
    m: int,
    calls_of: Callable[[Contender], list[Bound]],
    error_of: Callable[[Contender, Tensor], float],
) -> list[Candidate]:
    """Those whose result for m activations is right. One of ours that is wrong ends the run; a peer that is wrong or
    takes too long is left out."""
    found = []
    for contender in contenders:
        try:
            _refuse_slow(contender, contender.pace * m)
            calls = calls_of(contender)
            started = time.perf_counter()
            result = calls[0]()
            seconds = time.perf_counter() - started
            if m >= SCALES_FROM:
                contender.pace = seconds / m
            error = checked(contender.name, error_of(contender, result), contender.bound)
            _refuse_slow(contender, seconds)
            found.append(Candidate(contender.name, contender.role, contender.rotating(calls), error))
        except Exception as reason:
            if contender.role == OURS:
                raise
            print(f"{contender.name} is left out of {case}: {reason}")
    return found


def _refuse_slow(contender: Contender, seconds: float) -> None:
    if contender.role != OURS and seconds > TOO_SLOW:
        raise TimeoutError(f"a call takes about {seconds:.1f} s")


def product_error(y: Tensor, x: Tensor, decoded: Tensor) -> float:
    """Relative to the float64 product with the decoded weights, on rows that are spread over the weight."""
    m, n = y.shape
    if (m, n) != (x.size(0), decoded.size(0)):
        raise WrongOutputError(f"the product has the shape {tuple(y.shape)}")
    rows = torch.linspace(0, n - 1, max(1, min(n, max(64, CHECKED // (16 * m))))).long()
    return relative_error(y[:, rows], x.double() @ decoded[rows].double().T)


class Reading:
    """The limit of a product with few activations: its packed bytes and scales, read once."""

    def __init__(self, weight: Weight, *, cold: bool = True) -> None:
        needed = copies_beyond_caches(weight.nbytes) if cold else 1
        self.copies = [weight.copy() for _ in range(needed)] if limits() is not None else []

    def candidates(self, place: str) -> list[Candidate]:
        loops = limits()
        if loops is None:
            return []
        copies = self.copies if place == COLD else self.copies[:1]
        return [Candidate(READ, LIMIT, rotating([lambda copy=copy: loops.read(*copy) for copy in copies]))]  # type: ignore[misc]
