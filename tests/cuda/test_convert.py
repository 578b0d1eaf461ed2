"""convert on a GPU writes the files that it writes on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import squish_nf4
from tests.support.directories import contents, gaussian, save_shard


def test_the_bytes_are_those_of_the_cpu(tmp_path: Path) -> None:
    tensors = {
        "a.weight": gaussian(3000, 1024),
        "b.weight": gaussian(3, 40, 96, dtype=torch.bfloat16, seed=8),
        "c.weight": gaussian(64, 64, dtype=torch.float64, seed=9),
        "d.weight": gaussian(64, 64, seed=10).to(torch.float8_e4m3fn),
        "e.weight": gaussian(5, 65_600, dtype=torch.float16, seed=11),
    }
    save_shard(tmp_path / "model.safetensors", tensors)
    for options in ({}, {"outlier_threshold": math.inf, "group_size": 64}):
        for device in ("cpu", "cuda", "cuda:0"):
            squish_nf4.convert(
                tmp_path / "model.safetensors", tmp_path / device, device=device, overwrite=True, **options
            )
        assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu") == contents(tmp_path / "cuda:0")
