"""squish-nf4 convert of a checkpoint against a plain copy of its files, both down to the disk, and the bare kernel.

The source is in the page cache; where a disk reads more slowly than that, the disk is what a conversion waits for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import squish_nf4
from benchmarks.bench import DTYPES, Candidate, Options, measure, require_equal
from benchmarks.records import COLD, LIMIT, OURS, PEER, Case, Record

WHAT = "convert a checkpoint"
NAME, COPY, KERNEL = "squish-nf4 convert --nf4", "copy of the same files", "the quantize kernel alone"
SHARDS, LAYERS = 2, 4  # of a shard
GROUP_SIZE = 32


def run(options: Options) -> Iterator[Record]:
    size, threads = options.square, max(options.threads)
    torch.set_num_threads(threads)
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            weights = [torch.randn(size, size).to(DTYPES[dtype]) for _ in range(SHARDS * LAYERS)]
            nbytes = sum(weight.nbytes for weight in weights)
            n = len(weights) * size
            case = Case("checkpoint", WHAT, dtype, n, size, group_size=GROUP_SIZE, threads=threads, place=COLD)
            for record in measure(case, candidates(Path(folder), weights), options):
                print(f"  {record.candidate:<44} {nbytes / record.ms / 1e3:>10.0f} MB of input a second")
                yield record


def candidates(folder: Path, weights: list[Tensor]) -> list[Candidate]:
    source, converted, copied = folder / "source", folder / "converted", folder / "copied"
    source.mkdir()
    for shard in range(SHARDS):
        held = weights[shard * LAYERS : (shard + 1) * LAYERS]
        save_file({f"{shard}.{layer}": weight for layer, weight in enumerate(held)}, source / f"{shard}.safetensors")

    def convert(_: int) -> None:
        shutil.rmtree(converted, ignore_errors=True)
        squish_nf4.convert(source, converted, group_size=GROUP_SIZE, min_free_gb=0)

    def copy(_: int) -> None:
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(source, copied)
        for file in copied.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def kernel(_: int) -> object:
        return [torch.ops.squish.quantize_nf4(weight, GROUP_SIZE) for weight in weights]

    convert(0)
    decoded = torch.ops.squish.dequantize_nf4(*torch.ops.squish.quantize_nf4(weights[0], GROUP_SIZE), GROUP_SIZE)
    error = require_equal(NAME, squish_nf4.load_npy_dir(converted)["0.0"], decoded)
    return [
        Candidate(NAME, OURS, convert, error),
        Candidate(COPY, LIMIT, copy),
        Candidate(KERNEL, PEER, kernel, 0.0),
    ]
