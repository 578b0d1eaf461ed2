"""linear_nf4 against dense torch and bitsandbytes, weights cold: the calls rotate over more copies than caches hold."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.peers import bitsandbytes_functional
from benchmarks.timing import Candidate, alternate, machine, print_table

GROUP_SIZE = 64


def check(x: torch.Tensor, dense: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """What is timed is right: the float64 product on the decoded weights, within the rounding of the dtype."""
    y = torch.ops.squish.linear_nf4(x, packed, scales, None, GROUP_SIZE)
    exact = x.double() @ dense.double().T
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[x.dtype], error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 64, 256])
    options = parser.parse_args()
    n = options.size
    copies = max(2, (128 << 20) // (n * n // 2))
    w = torch.randn(n, n)
    packed, scales = torch.ops.squish.quantize_nf4(w, GROUP_SIZE)
    decoded = torch.ops.squish.dequantize_nf4(packed, scales, GROUP_SIZE)
    packs = [(packed.clone(), scales.clone()) for _ in range(copies)]
    peer = bitsandbytes_functional()
    print(machine())
    for name in options.dtypes:
        dtype = getattr(torch, name)
        dense = [decoded.to(dtype).clone() for _ in range(4)]
        for m in options.batches:
            x = torch.randn(m, n).to(dtype)
            check(x, decoded, packed, scales)
            candidates: dict[str, Candidate] = {
                "squish linear_nf4": lambda i, x=x: torch.ops.squish.linear_nf4(
                    x, *packs[i % copies], None, GROUP_SIZE
                ),
                "dense torch": lambda i, x=x, dense=dense: F.linear(x, dense[i % 4]),
                "read the packed bytes (limit)": lambda i: packs[i % copies][0].view(torch.int64).sum(),
            }
            if peer is not None:
                candidates["bitsandbytes Linear4bit"] = bitsandbytes_linear(w, dtype, copies, x)
            print_table(f"{name}, M = {m}, {n} x {n}", alternate(candidates, "dense torch", options.rounds), "dense")


def bitsandbytes_linear(w: torch.Tensor, dtype: torch.dtype, copies: int, x: torch.Tensor) -> Candidate:
    import bitsandbytes as bnb

    layers = []
    for _ in range(copies):
        layer = bnb.nn.Linear4bit(w.size(1), w.size(0), bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.to(dtype), requires_grad=False, quant_type="nf4", blocksize=GROUP_SIZE)
        layers.append(layer.to("cpu").eval())
        with torch.no_grad():
            layers[-1](x)  # its first call lays the weight out for the CPU

    def call(i: int) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = layers[i % copies](x)
        return result

    return call


if __name__ == "__main__":
    main()
