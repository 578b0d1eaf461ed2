"""quantize_nf4 and dequantize_nf4 against peers and against loops over the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.bench import (
    DTYPES,
    Candidate,
    Options,
    checked,
    measure,
    over,
    relative_error,
    require_equal,
    rotation,
)
from benchmarks.limits import limits
from benchmarks.peers import Codec, left_out_if_it_fails, peers
from benchmarks.records import COLD, HOT, LIMIT, OURS, PEER, Case, Record
from benchmarks.suites.weights import GROUP_SIZE
from tests.support import reference

QUANTIZE, DEQUANTIZE = "quantize", "dequantize"
OUT, FRESH = "squish_nf4 .out", "squish_nf4"
HOT_SIZE = 1024
ROWS = 32  # that are compared with the definition, spread over the matrix
PEER_BOUND = 0.11  # of the decoded weights, relative to Gaussian ones at group size 64; NF4 has 0.092


def run(options: Options) -> Iterator[Record]:
    sizes = [(options.square, COLD)]
    if not options.quick:
        sizes.append((min(HOT_SIZE, options.square), HOT))
    for count in options.threads:
        torch.set_num_threads(count)
        for dtype in options.dtypes:
            for size, place in sizes:
                w = torch.randn(size, size, generator=torch.Generator().manual_seed(5)).to(DTYPES[dtype])
                yield from measure(_case(QUANTIZE, dtype, size, count, place), quantizers(w, place), options)
                yield from measure(_case(DEQUANTIZE, dtype, size, count, place), decoders(w, place), options)


def _case(what: str, dtype: str, size: int, threads: int, place: str) -> Case:
    return Case("codec", what, dtype, size, size, group_size=GROUP_SIZE, threads=threads, place=place)


def quantizers(w: Tensor, place: str) -> list[Candidate]:
    """The definition, the peers, and the loops that read w and write as many bytes as are packed."""
    packed, scales = torch.ops.squish.quantize_nf4(w, GROUP_SIZE)
    rows = some_rows(w.size(0))
    right = [torch.from_numpy(part) for part in reference.quantize(w[rows].float().numpy(), GROUP_SIZE)]
    error = max(require_equal("quantize_nf4", *pair) for pair in zip((packed[rows], scales[rows]), right, strict=True))

    def copies() -> list[Tensor]:
        return rotation(place, w.nbytes, w, w.clone)

    def ours(w: Tensor) -> object:
        return torch.ops.squish.quantize_nf4(w, GROUP_SIZE)

    candidates = [Candidate(FRESH, OURS, over(copies(), ours), error)]
    for name, codec, bad in _codecs(w, place):
        if name != "numpy":  # which has no quantizer of its own
            candidates.append(Candidate(name, PEER, over(copies(), codec.quantize), bad))
    if (loops := limits()) is not None:
        out = torch.empty_like(packed)
        for streaming in (False, True):

            def loop(w: Tensor, streaming: bool = streaming) -> None:
                loops.read_and_store(w, out, streaming=streaming)

            candidates.append(Candidate(_named("read w, write packed", streaming), LIMIT, over(copies(), loop)))
    return candidates


def decoders(w: Tensor, place: str) -> list[Candidate]:
    """Both forms, the peers, and loops that store as many bytes, into the same memory and into fresh memory."""
    stored = torch.ops.squish.quantize_nf4(w, GROUP_SIZE)
    nbytes = sum(part.nbytes for part in stored)
    rows = some_rows(w.size(0))
    packed, scales = (part[rows].numpy() for part in stored)
    right = torch.from_numpy(reference.dequantize(packed, scales, GROUP_SIZE)).to(w.dtype)
    out = torch.empty_like(w)

    def into(pair: Sequence[Tensor]) -> Tensor:
        result: Tensor = torch.ops.squish.dequantize_nf4.out(*pair, GROUP_SIZE, out=out)
        return result

    def fresh(pair: Sequence[Tensor]) -> Tensor:
        result: Tensor = torch.ops.squish.dequantize_nf4(*pair, GROUP_SIZE, dtype=w.dtype)
        return result

    def copies() -> list[Sequence[Tensor]]:
        return rotation(place, nbytes, stored, lambda: [part.clone() for part in stored])

    forms: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {OUT: into, FRESH: fresh}
    candidates = [
        Candidate(name, OURS, over(copies(), form), require_equal(name, form(stored)[rows], right))
        for name, form in forms.items()
    ]
    for name, codec, bad in _codecs(w, place):
        theirs = codec.quantize(w)
        kept = rotation(place, nbytes, theirs, lambda theirs=theirs: copy.deepcopy(theirs))  # type: ignore[misc]
        candidates.append(Candidate(name, PEER, over(kept, codec.dequantize), bad))
    return candidates + _store_loops(out, [pair[0] for pair in copies()])


def _store_loops(out: Tensor, packed: Sequence[Tensor]) -> list[Candidate]:
    if (loops := limits()) is None:
        return []
    found = []
    for streaming in (False, True):

        def read_too(packed: Tensor, streaming: bool = streaming) -> None:
            loops.read_and_store(packed, out, streaming=streaming)

        def same(_: int, streaming: bool = streaming) -> None:
            loops.store(out, streaming=streaming)

        def fresh(_: int, streaming: bool = streaming) -> Tensor:
            memory = torch.empty_like(out)
            loops.store(memory, streaming=streaming)
            return memory

        found.append(Candidate(_named("store, same memory", streaming), LIMIT, same))
        found.append(Candidate(_named("read packed, store, same memory", streaming), LIMIT, over(packed, read_too)))
        found.append(Candidate(_named("store, fresh memory", streaming), LIMIT, fresh))
    return found


def _codecs(w: Tensor, place: str) -> Iterator[tuple[str, Codec, float]]:
    """The peers that encode and decode such a weight, with the error of what they decode; slow ones only if hot."""
    for peer in peers():
        if peer.slow and place == COLD:
            continue
        with left_out_if_it_fails(peer, f"the codec in {w.dtype}"):
            codec = peer.codec(w.dtype, GROUP_SIZE)
            if codec is not None:
                error = relative_error(codec.dequantize(codec.quantize(w)), w)
                yield peer.name, codec, checked(peer.name, error, PEER_BOUND)


def _named(loop: str, streaming: bool) -> str:
    return f"{loop}, past the caches" if streaming else loop


def some_rows(n: int) -> Tensor:
    return torch.linspace(0, n - 1, min(n, ROWS)).long()
