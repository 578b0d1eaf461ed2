"""quantize_nf4 and dequantize_nf4 against bitsandbytes and against loops over the same bytes."""

from __future__ import annotations

import argparse

import torch

from benchmarks.peers import bitsandbytes_functional
from benchmarks.timing import alternate, machine, print_table

GROUP_SIZE = 64


def check(w: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """What is timed is right: every weight decodes to the level nearest to it."""
    decoded = torch.ops.squish.dequantize_nf4(packed, scales, GROUP_SIZE)
    error = float((decoded - w).norm() / w.norm())
    assert abs(error - 0.092) < 0.002, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    n = options.size
    copies = max(2, (256 << 20) // (4 * n * n))  # more than any cache holds
    ws = [torch.randn(n, n) for _ in range(copies)]
    packs = [torch.ops.squish.quantize_nf4(w, GROUP_SIZE) for w in ws]
    check(ws[0], *packs[0])
    out, half = torch.empty(n, n), torch.empty(n, n // 2, dtype=torch.uint8)
    print(machine())

    quantizers = {
        "squish quantize float32": lambda i: torch.ops.squish.quantize_nf4(ws[i % copies], GROUP_SIZE),
        "read w, write packed (limit)": lambda i: (ws[i % copies].sum(), half.fill_(0)),
    }
    decoders = {
        "squish dequantize float32 (.out)": lambda i: torch.ops.squish.dequantize_nf4.out(
            *packs[i % copies], GROUP_SIZE, out=out
        ),
        "squish dequantize float32 (fresh)": lambda i: torch.ops.squish.dequantize_nf4(*packs[i % copies], GROUP_SIZE),
        "store loop into the same (limit)": lambda i: out.fill_(1.0),
    }
    peer = bitsandbytes_functional()
    if peer is not None:
        states = [peer.quantize_4bit(w, blocksize=GROUP_SIZE, quant_type="nf4") for w in ws]
        quantizers["bitsandbytes quantize_4bit"] = lambda i: peer.quantize_4bit(
            ws[i % copies], blocksize=GROUP_SIZE, quant_type="nf4"
        )
        decoders["bitsandbytes dequantize_4bit"] = lambda i: peer.dequantize_4bit(*states[i % copies])
    for title, candidates in (("quantize", quantizers), ("dequantize", decoders)):
        limit = next(name for name in candidates if "limit" in name)
        timings = alternate(candidates, limit, options.rounds)
        print_table(f"{title} {n} x {n}, float32, group size {GROUP_SIZE}, cold", timings, "limit")


if __name__ == "__main__":
    main()
