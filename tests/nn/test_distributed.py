"""Packed weights in DDP, FSDP2 and distributed checkpoints, on two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.helpers import require
from tests.support.processes import start

pytestmark = pytest.mark.sweeps


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    require("gloo", torch.distributed.is_available() and torch.distributed.is_gloo_available(), "torch has no gloo")
    ranks = [
        start(
            [sys.executable, "-W", "ignore", "-m", "tests.support.distributed", str(rank), "2", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate()[0] for process in ranks]  # one that fails ends the other: its peer is gone
    finally:
        for process in ranks:
            process.kill()
    for text in said:
        assert text.splitlines()[-1] == "whole", "\n".join(said)
