"""TorchScript files in this process: for tests of what is done with a file's results, not of how they come about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from squish_nf4.torchscript import export, trial_program
from squish_nf4.torchscript.calls import Call
from squish_nf4.torchscript.trial import Trial


def run_here(file: Path, calls: Sequence[Call]) -> Trial:
    """As squish_nf4.torchscript.trial.try_in_fresh_process, in this process."""
    module = torch.jit.load(file)
    return Trial(tuple(trial_program.operators(str(file))), [trial_program.call(module, *call) for call in calls])


def load(path: Path) -> Any:
    with export.torchs_warning_off():
        return torch.jit.load(path)
