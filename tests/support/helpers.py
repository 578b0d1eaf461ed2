"""What several tests share: skips that CI turns into failures, and CPU paths forced in a child process."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from squish_nf4 import _C

ISAS: tuple[str, ...] = tuple(_C.cpu_isas())


def require(what: str, available: bool, why: str) -> None:
    """Skip the test unless ``available``; fail instead if SQUISH_REQUIRE (a comma-separated list) names ``what``."""
    if available:
        return
    if what in os.environ.get("SQUISH_REQUIRE", "").split(","):
        pytest.fail(f"SQUISH_REQUIRE names {what}, but {why}", pytrace=False)
    pytest.skip(f"needs {what}: {why}", allow_module_level=True)


def required_module(name: str) -> Any:
    """A package that not every machine has; without it the test, or the file, is skipped."""
    require(name, find_spec(name) is not None, f"the package {name} is not installed")
    return importlib.import_module(name)


def require_torch(minor: str, older: str) -> None:
    """Skip the test on a torch before ``minor`` ("2.13"); ``older`` says what such a torch cannot do."""
    wanted, found = (tuple(int(part) for part in text.split(".")[:2]) for text in (minor, torch.__version__))
    require(f"torch-{minor}", found >= wanted, f"torch {torch.__version__} {older}")


def require_isa(isa: str) -> None:
    require(isa, isa in _C.cpu_isas(available=True), f"this CPU's best path is {_C.cpu_isa()}")


def require_transformers() -> None:
    require("transformers", find_spec("transformers") is not None, "the package transformers is not installed")


class ForcedIsa:
    """A child process in which SQUISH_NF4_ISA caps the CPU path (it is read once per process)."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_set_isa, initargs=(isa,)
        )

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in the child: a function of a module, and arguments that can be pickled."""
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        self._pool.shutdown()


def _set_isa(isa: str) -> None:
    os.environ["SQUISH_NF4_ISA"] = isa


def through_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def names(report: Any) -> list[str]:
    """Of the layers that quantize_model quantized."""
    return [layer.name for layer in report.layers]


def reasons(report: Any) -> dict[str, str]:
    """Why quantize_model left modules alone, by name."""
    return {entry.name: entry.reason for entry in report.left_alone}


def relative(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of ``exact``, which is float64."""
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())
