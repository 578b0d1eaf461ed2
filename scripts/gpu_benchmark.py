"""How fast the operators are on a GPU, beside what its memory allows, cuBLAS and bitsandbytes. Called by gpu_check.py.

A candidate is one call on each of several copies of its arguments, together more than three times what the L2 cache
holds, captured in a CUDA graph. Candidates are replayed in turn; the time of a call is the median over the rounds.
Outputs are kept until the capture ends, so that each call writes to memory of its own. Values are random. Our own
result is compared with the definition's before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import squish_nf4  # noqa: F401  it registers the operators

OPS = torch.ops.squish
GROUP_SIZE = 64
ROUNDS = 15
GRAPH_MILLISECONDS = 1.5  # a graph is made at least as long, so that starting it does not count
CODEC_SHAPES = ((8192, 8192), (4096, 4096))
LINEAR_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
OTHER_SHAPE, OTHER_BATCHES = (8192, 8192), (1, 4, 8, 16, 32)
OTHERS = ((torch.bfloat16, 128), (torch.bfloat16, 16), (torch.float32, 64))
CEILING_BYTES = 1 << 30

Call = Callable[[], Any]


@dataclass
class Record:
    """The time of one candidate. ``bytes``: what the call must read and write at least."""

    what: str
    candidate: str
    n: int
    d: int
    m: int
    bytes: int
    microseconds: float
    spread: float  # of the rounds: (highest - lowest) / median

    @property
    def gigabytes_a_second(self) -> float:
        return self.bytes / self.microseconds / 1e3


@dataclass
class Case:
    """Candidates to be measured in turn. ``calls``: of each, one call for every copy of the arguments."""

    what: str
    n: int
    d: int
    m: int
    bytes: dict[str, int]
    calls: dict[str, list[Call]]


# --- timing


def capture(calls: list[Call], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            kept += [call() for call in calls]
    return graph


def replay_microseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def measure(case: Case) -> Iterator[Record]:
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, calls in case.calls.items():
        try:
            calls[0]()
            torch.cuda.synchronize()
            once = capture(calls, 1)
            replay_microseconds(once)
            repeats = max(1, math.ceil(GRAPH_MILLISECONDS * 1e3 / replay_microseconds(once)))
            graphs[name] = (capture(calls, repeats) if repeats > 1 else once, repeats * len(calls))
        except Exception as error:  # a peer that cannot be captured is left out with a word
            if name == "squish_nf4":
                raise
            print(f"{case.what}: {name} was left out: {error}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_ in range(ROUNDS + 2):
        for name, (graph, count) in graphs.items():
            microseconds = replay_microseconds(graph) / count
            if round_ >= 2:
                times[name].append(microseconds)
    for name, taken in times.items():
        median = statistics.median(taken)
        size = case.bytes.get(name, case.bytes["squish_nf4"])
        yield Record(case.what, name, case.n, case.d, case.m, size, median, (max(taken) - min(taken)) / median)


# --- what is measured


def copies_for(size: int) -> int:
    """How many copies of ``size`` bytes make three times the L2 cache."""
    return max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / size))


def ceilings() -> Iterator[Case]:
    a = torch.randn(CEILING_BYTES // 4, device="cuda")
    b = torch.empty_like(a)
    sizes = {"squish_nf4": 0, "copy": 2 * CEILING_BYTES, "read": CEILING_BYTES, "write": CEILING_BYTES}
    calls: dict[str, list[Call]] = {
        "copy": [lambda: torch.neg(a, out=b)],  # a kernel: what copy_ does in a graph is slower
        "read": [lambda: a.sum()],
        "write": [lambda: b.fill_(1.0)],
    }
    yield Case("memory", 0, 0, 0, sizes, calls)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def quantize_cases() -> Iterator[Case]:
    for n, d in CODEC_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            size = n * d * dtype.itemsize + packed_bytes(n, d)
            weights = [torch.randn(n, d, device="cuda").to(dtype) for _ in range(copies_for(size))]
            packed, scales = OPS.quantize_nf4(weights[0], GROUP_SIZE)
            expected = OPS.quantize_nf4(weights[0][:64].cpu(), GROUP_SIZE)
            assert same_bits(packed[:64], expected[0])
            assert same_bits(scales[:64], expected[1])
            calls: list[Call] = [partial(OPS.quantize_nf4, w, GROUP_SIZE) for w in weights]
            yield Case(f"quantize {name_of(dtype)}", n, d, 0, {"squish_nf4": size}, {"squish_nf4": calls})


def dequantize_cases(bnb: Any) -> Iterator[Case]:
    for n, d in CODEC_SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            size = n * d * dtype.itemsize + packed_bytes(n, d)
            weights = [quantized(n, d) for _ in range(copies_for(size))]
            found = OPS.dequantize_nf4(*weights[0], GROUP_SIZE, dtype=dtype)
            assert same_bits(
                found[:64], OPS.dequantize_nf4(*(t[:64].cpu() for t in weights[0]), GROUP_SIZE, dtype=dtype)
            )
            calls: dict[str, list[Call]] = {}
            calls["squish_nf4"] = [partial(OPS.dequantize_nf4, *w, GROUP_SIZE, dtype=dtype) for w in weights]
            if bnb:
                theirs = [bnb_quantized(bnb, n, d, dtype) for _ in weights]
                calls["bitsandbytes"] = [partial(bnb.functional.dequantize_4bit, *w) for w in theirs]
            yield Case(f"dequantize {name_of(dtype)}", n, d, 0, {"squish_nf4": size}, calls)


def linear_cases(bnb: Any) -> Iterator[Case]:
    dtype = torch.bfloat16
    for n, d in LINEAR_SHAPES:
        weights = [quantized(n, d) for _ in range(copies_for(packed_bytes(n, d)))]
        dense = [torch.randn(n, d, device="cuda", dtype=dtype) for _ in range(copies_for(2 * n * d))]
        theirs = [bnb_quantized(bnb, n, d, dtype) for _ in weights] if bnb else []
        bytes_alone = [torch.randn(packed_bytes(n, d) // 4, device="cuda") for _ in weights]
        for m in BATCHES:
            x = torch.randn(m, d, device="cuda", dtype=dtype)
            check_product(OPS.linear_nf4(x, *weights[0], None, GROUP_SIZE), x, weights[0])
            calls: dict[str, list[Call]] = {
                "squish_nf4": [partial(OPS.linear_nf4, x, *w, None, GROUP_SIZE) for w in weights],
                "cuBLAS": [partial(torch.nn.functional.linear, x, w) for w in dense],
            }
            if m >= 16:
                calls["dequantize + cuBLAS"] = [partial(dequantize_and_multiply, x, *w) for w in weights]
            if m == 1:
                calls["read of as many bytes"] = [t.sum for t in bytes_alone]
            if bnb:
                calls["bitsandbytes"] = [partial(bnb.matmul_4bit, x, q.t(), state) for q, state in theirs]
            size = packed_bytes(n, d) + 2 * m * (n + d)
            yield Case("linear bfloat16", n, d, m, {"squish_nf4": size, "cuBLAS": 2 * (n * d + m * (n + d))}, calls)


def other_linear_cases() -> Iterator[Case]:
    """Another group size, and what tensor cores do not take: against decoding and cuBLAS."""
    n, d = OTHER_SHAPE
    for dtype, group_size in OTHERS:
        weights = [quantized(n, d, group_size) for _ in range(copies_for(packed_bytes(n, d, group_size)))]
        for m in OTHER_BATCHES:
            x = torch.randn(m, d, device="cuda", dtype=dtype)
            check_product(OPS.linear_nf4(x, *weights[0], None, group_size), x, weights[0], group_size)
            calls: dict[str, list[Call]] = {
                "squish_nf4": [partial(OPS.linear_nf4, x, *w, None, group_size) for w in weights],
                "dequantize + cuBLAS": [partial(dequantize_and_multiply, x, *w, group_size) for w in weights],
            }
            size = packed_bytes(n, d, group_size) + x.element_size() * m * (n + d)
            what = f"linear {name_of(dtype)}, group size {group_size}"
            yield Case(what, n, d, m, {"squish_nf4": size}, calls)


def dequantize_and_multiply(x: Tensor, packed: Tensor, scales: Tensor, group_size: int = GROUP_SIZE) -> Tensor:
    return torch.nn.functional.linear(x, OPS.dequantize_nf4(packed, scales, group_size, dtype=x.dtype))


def packed_bytes(n: int, d: int, group_size: int = GROUP_SIZE) -> int:
    return n * d // 2 + 4 * n * d // group_size


def quantized(n: int, d: int, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (n, d // 2), dtype=torch.uint8, device="cuda")
    return packed, torch.rand(n, d // group_size, device="cuda") / d**0.5


def bnb_quantized(bnb: Any, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    w = torch.randn(n, d, device="cuda", dtype=dtype) / d**0.5
    return bnb.functional.quantize_4bit(w, blocksize=GROUP_SIZE, quant_type="nf4")  # type: ignore[no-any-return]


def check_product(y: Tensor, x: Tensor, weight: tuple[Tensor, Tensor], group_size: int = GROUP_SIZE) -> None:
    exact = x.float() @ OPS.dequantize_nf4(*weight, group_size).t()
    error = float((y.float() - exact).norm() / exact.norm())
    assert error < 0.01, f"linear_nf4 of {x.shape[0]} activations is off by {error:.2g}"


def activations(m: int) -> str:
    return f"{m} activation{'s' if m > 1 else ''}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- goals and tables, from the records as they stand in the JSON


@dataclass
class Goal:
    text: str
    wanted: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "NOT MEASURED"
        return "PASS" if self.measured >= self.wanted else "FALLS SHORT"


class Figures:
    """Times and speeds by name; a ratio of what was not measured is None."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.times = {(r["what"], r["candidate"], r["n"], r["d"], r["m"]): r["microseconds"] for r in records}
        self.speeds = {
            (r["what"], r["candidate"], r["n"], r["d"], r["m"]): r["bytes"] / r["microseconds"] for r in records
        }

    def of_memory(self, what: str, limit: str, n: int, d: int, m: int = 0) -> float | None:
        """The speed in bytes, as a part of that of ``limit``."""
        speed, best = self.speeds.get((what, "squish_nf4", n, d, m)), self.speeds.get(("memory", limit, 0, 0, 0))
        return speed / best if speed and best else None

    def times_faster(self, n: int, d: int, m: int, *others: str) -> float | None:
        """Than the fastest of ``others``, at the linear layer."""
        own = self.times.get(("linear bfloat16", "squish_nf4", n, d, m))
        found = [self.times.get(("linear bfloat16", other, n, d, m)) for other in others]
        known = [time for time in found if time]
        return min(known) / own if own and known else None


def goals(records: list[dict[str, Any]]) -> list[Goal]:
    f = Figures(records)
    large = 8192, 8192
    found = [
        Goal(f"dequantize {dtype}, of a copy's speed", 0.90, f.of_memory(f"dequantize {dtype}", "copy", *large))
        for dtype in ("float32", "bfloat16", "float16")
    ]
    found += [
        Goal(f"quantize {dtype}, of a copy's speed", wanted, f.of_memory(f"quantize {dtype}", "copy", *large))
        for dtype, wanted in (("float32", 0.85), ("bfloat16", 0.75))
    ]
    for m, wanted in ((1, 0.80), (4, 0.75), (8, 0.75), (16, 0.70)):
        measured = f.of_memory("linear bfloat16", "read", *large, m)
        found.append(Goal(f"linear, {activations(m)}, 8192 x 8192, of a read's speed", wanted, measured))
    for m, wanted in ((1, 1.6), (4, 3.0), (8, 3.0)):
        measured = f.times_faster(*large, m, "bitsandbytes")
        found.append(Goal(f"linear, {activations(m)}, 8192 x 8192, times faster than bitsandbytes", wanted, measured))
    found.append(
        Goal("linear, 1 activation, 8192 x 8192, times faster than cuBLAS", 2.9, f.times_faster(*large, 1, "cuBLAS"))
    )
    found.append(
        Goal(
            "linear, 1 activation, 4096 x 4096, times faster than bitsandbytes",
            1.0,
            f.times_faster(4096, 4096, 1, "bitsandbytes"),
        )
    )
    for n, d in LINEAR_SHAPES:
        for m in (32, 64):
            text = f"linear, {m} activations, {n} x {d}, times faster than bitsandbytes, dequantize + cuBLAS"
            found.append(Goal(text, 1.0, f.times_faster(n, d, m, "bitsandbytes", "dequantize + cuBLAS")))
        found.append(
            Goal(f"linear, 2048 activations, {n} x {d}, of cuBLAS's speed", 0.85, f.times_faster(n, d, 2048, "cuBLAS"))
        )
    return found


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for every case, a column for every candidate; microseconds, and for ours the bytes a second."""
    names = list(dict.fromkeys(r["candidate"] for r in records if r["what"] != "memory"))
    lines = ["Microseconds a call, medians; in brackets GB/s of the bytes that the call must move:", ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in records:
        cases.setdefault((r["what"], r["n"], r["d"], r["m"]), {})[r["candidate"]] = r
    for (what, n, d, m), found in cases.items():
        if what == "memory":
            continue
        cells = [
            f"{found[c]['microseconds']:.1f} ({found[c]['bytes'] / found[c]['microseconds'] / 1e3:.0f})"
            if c in found
            else ""
            for c in names
        ]
        lines.append(f"| {what}, {n} x {d}{f', {activations(m)}' if m else ''} | {' | '.join(cells)} |")
    limits = [r for r in records if r["what"] == "memory"]
    speeds = ", ".join(f"{r['candidate']} {r['bytes'] / r['microseconds'] / 1e3:.0f} GB/s" for r in limits)
    return [f"1 GiB: {speeds or 'not measured'}.", "", *lines]


def bitsandbytes() -> Any:
    """The module, or None where it cannot be imported."""
    try:
        import bitsandbytes as bnb
    except Exception as error:  # whatever a package without its library raises
        print(f"without bitsandbytes: {error}")
        return None
    return bnb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="no GPU: write no records, and print the goals")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    if not arguments.dry_run:
        warnings.simplefilter("ignore")
        bnb = bitsandbytes()
        with torch.no_grad():
            for cases in (ceilings(), dequantize_cases(bnb), quantize_cases(), linear_cases(bnb), other_linear_cases()):
                for case in cases:
                    records += [asdict(record) for record in measure(case)]
                    arguments.output.write_text(json.dumps(records))  # what was measured stays, whatever comes
    arguments.output.write_text(json.dumps(records))
    print(f"{len(records)} figures, {len(goals(records))} goals")


if __name__ == "__main__":
    main()
