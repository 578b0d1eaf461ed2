"""What a call costs where there is next to nothing to compute: 64 x 64, one activation, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import squish_nf4
from benchmarks.bench import DTYPES, Candidate, Options, measure
from benchmarks.peers import left_out_if_it_fails, peers
from benchmarks.records import HOT, OURS, PEER, Case, Record
from benchmarks.suites.weights import GROUP_SIZE, Contender, ours, products, random_weight, theirs

WHAT, WHAT_QUANTIZE = "call of a layer", "call of quantize"
OP, MODULE = "squish_nf4 op", "squish_nf4 NF4Linear"
SIZE = 64


def run(options: Options) -> Iterator[Record]:
    torch.set_num_threads(1)
    for dtype in options.dtypes:
        candidates = layers(dtype)
        with torch.no_grad():  # as where a model is served
            yield from measure(_case(WHAT, dtype, 1), candidates, options)
    yield from measure(_case(WHAT_QUANTIZE, "float32", 0), quantizers(), options)


def _case(what: str, dtype: str, m: int) -> Case:
    return Case("overhead", what, dtype, SIZE, SIZE, m, GROUP_SIZE, 1, HOT)


def layers(dtype: str) -> list[Candidate]:
    weight = random_weight(SIZE, SIZE)
    x = torch.randn(1, SIZE).to(DTYPES[dtype])
    linear = torch.nn.Linear(SIZE, SIZE, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight.decoded)
        module = squish_nf4.NF4Linear.from_linear(linear.to(DTYPES[dtype])).eval()
    own = ours(weight, DTYPES[dtype], cold=False)
    layer = Contender(
        MODULE, OURS, module.to_linear().weight.detach().float(), [lambda x: lambda: module(x)], own.bound
    )
    with torch.no_grad():
        checked = products([own, layer, *theirs(weight, DTYPES[dtype], cold=False)], x, HOT)
    packed, scales, op = weight.packed, weight.scales, torch.ops.squish.linear_nf4
    direct = {  # without the closures that the other suites can afford
        own.name: Candidate(OP, OURS, lambda _: op(x, packed, scales, None, GROUP_SIZE), checked[0].error),
        MODULE: Candidate(MODULE, OURS, lambda _: module(x), checked[1].error),
    }
    return [direct.get(candidate.name, candidate) for candidate in checked]


def quantizers() -> list[Candidate]:
    w = torch.randn(SIZE, SIZE)
    op = torch.ops.squish.quantize_nf4
    found = [Candidate(OP, OURS, lambda _: op(w, GROUP_SIZE), 0.0)]
    for peer in peers():
        with left_out_if_it_fails(peer, WHAT_QUANTIZE):
            codec = peer.codec(w.dtype, GROUP_SIZE)
            if codec is not None and peer.name != "numpy":
                codec.quantize(w)
                found.append(Candidate(peer.name, PEER, lambda _, codec=codec: codec.quantize(w)))  # type: ignore[misc]
    return found
