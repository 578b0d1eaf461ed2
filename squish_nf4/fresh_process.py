"""Runs an exported file in a fresh Python process that never imports squish_nf4, and compares results to the bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from squish_nf4 import fresh_run
from squish_nf4._native import library_path
from squish_nf4.example_calls import Call, Leaves

# What rounding may do to a result, relative to its largest magnitude, where an export computes in another order.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class TorchScriptError(RuntimeError):
    """TorchScript cannot take the model, or what it made of it does not compute what the model computes."""


@dataclass(frozen=True)
class FreshRun:
    """operators: those of squish that the file calls. outputs: per call the leaves of the result, or the error."""

    operators: tuple[str, ...]
    outputs: list[Leaves | str]


def run_fresh(file: Path, calls: Sequence[Call]) -> FreshRun:
    """Load a TorchScript file where only the op library is loaded, and call it. Settings are those of this process.

    tasks and results travel in files beside ``file``.

    Raises:
        TorchScriptError: the process failed, or could not load the file.
    """
    tasks, results = file.with_name("tasks"), file.with_name("results")
    settings = {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
    }
    torch.save({"calls": list(calls), **settings}, tasks)
    program = Path(fresh_run.__file__).read_text()
    command = [sys.executable, "-W", "ignore", "-c", program, library_path(), str(file), str(tasks), str(results)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the same torch
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise TorchScriptError(
            f"export_torchscript: a fresh process with only the op library cannot run the file: {said[-1]}"
        )
    found = torch.load(results, weights_only=True)
    return FreshRun(tuple(found["operators"]), found["outputs"])


@dataclass(frozen=True)
class Agreement:
    """Of two results. same_bits: everything is equal, bit for bit. difference: the largest |found - expected|.

    misfit: what is wrong, in words, where the difference is more than rounding.
    """

    same_bits: bool
    difference: float
    misfit: str | None = None


def compare(found: Leaves | str, expected: Leaves) -> Agreement:
    if isinstance(found, str):
        return Agreement(False, math.inf, found)
    if [place for place, _ in found] != [place for place, _ in expected]:
        places = [", ".join(f"result{place}" for place, _ in leaves) or "nothing" for leaves in (found, expected)]
        return Agreement(False, math.inf, f"it returns {places[0]}; eager returns {places[1]}")
    same, largest = True, 0.0
    for (place, value), (_, wanted) in zip(found, expected, strict=True):
        if not isinstance(value, Tensor) or not isinstance(wanted, Tensor):
            if type(value) is not type(wanted) or value != wanted:
                return Agreement(False, math.inf, f"result{place} is {value!r}; eager gives {wanted!r}")
            continue
        if (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
            kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (value, wanted)]
            return Agreement(False, math.inf, f"result{place} is {kinds[0]}; eager gives {kinds[1]}")
        if have_same_bits(value, wanted):
            continue
        same, difference = False, largest_difference(value, wanted)
        largest = max(largest, difference)
        if difference > ROUNDING.get(wanted.dtype, 0.0) * magnitude(wanted):
            return Agreement(False, difference, f"result{place} differs from eager by up to {difference:.3g}")
    return Agreement(same, largest)


def have_same_bits(a: Tensor, b: Tensor) -> bool:
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """0 where both are NaN, or the same infinity; inf where only one is."""
    first, second = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    difference = (first - second).abs()
    difference = difference.masked_fill((first == second) | (first.isnan() & second.isnan()), 0.0)
    return float(difference.nan_to_num(nan=math.inf).max())


def magnitude(t: Tensor) -> float:
    """The largest finite one."""
    values = t.abs().to(torch.float64)
    return float(values[values.isfinite()].max()) if bool(values.isfinite().any()) else 0.0
