"""python -O leaves out asserts: what they would have done has to be done all the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.processes import run

PROGRAM = """
import json, sys, torch, squish_nf4
assert False, "python -O did not take effect"
source, out, file = sys.argv[1:]
report = squish_nf4.convert(source, out, delete_source=False)
layer = squish_nf4.NF4Linear(64, 32).eval()
exported = squish_nf4.export_torchscript(layer, file, torch.randn(3, 64))
print(json.dumps({
    "quantized": [tensor.name for tensor in report.quantized],
    "problems": squish_nf4.verify(out, source).problems,
    "measured": squish_nf4.inspect(out, source).bases,
    "loaded": sorted(squish_nf4.load_npy_dir(out)),
    "planned": [planned.key for planned in squish_nf4.dry_run(source).tensors],
    "same_bits": exported.same_bits,
}))
"""


@pytest.mark.sweeps
@pytest.mark.parametrize("level", ["1", "2"])
def test_a_checkpoint_and_an_export_are_as_without_it(tmp_path: Path, level: str) -> None:
    tensors = {"w": torch.randn(8, 64), "b": torch.randn(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    done = run(
        [sys.executable, "-c", PROGRAM, tmp_path / "model.safetensors", tmp_path / "out", tmp_path / "layer.pt"],
        PYTHONOPTIMIZE=level,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "quantized": ["w"],
        "problems": [],
        "measured": ["measured"],
        "loaded": ["b", "w"],
        "planned": ["b", "w"],
        "same_bits": True,
    }
