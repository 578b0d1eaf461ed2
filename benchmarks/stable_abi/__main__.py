"""LibTorch's stable ABI measured against csrc/ops: what it costs, what works; docs/native/stable-abi.md decides.

python -m benchmarks.stable_abi [--pythons /other/venv/bin/python ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Call, alternate, conditions
from squish_nf4 import library_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11: hides what came later
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC"]  # as setup.py compiles
COMPILER = (os.environ.get("CXX") or "c++").split()
SAME_WORK = ("schema.cpp", "cpu_codec.cpp", "cpu_linear.cpp", "meta.cpp")  # of csrc/ops, what ops.cpp does too
CALLS = 200  # in one measurement


def compile_object(source: Path, folder: Path, *flags: str) -> tuple[Path, float]:
    """The object, and the compiler's user and system seconds, which other work on the machine hardly changes."""
    headers = [f"-I{ROOT}", *(f"-isystem{TORCH / path}" for path in ("include", "include/torch/csrc/api/include"))]
    output = folder / f"{source.parent.name}-{source.stem}.o"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMPILER, *FLAGS, *flags, *headers, "-c", str(source), "-o", str(output)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return output, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def link(output: Path, objects: Sequence[Path], *libraries: str) -> Path:
    words = [*COMPILER, "-shared", *map(str, objects), f"-L{TORCH / 'lib'}", *libraries, "-o", str(output)]
    subprocess.run(words, check=True)
    return output


def build(folder: Path, repeats: int) -> Path:
    """Compile both forms, print what it costs and return the stable one; the kernels of csrc/cpu are part of both."""
    kernels = [compile_object(source, folder)[0] for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    sources = [path for path in sorted((ROOT / "csrc/ops").glob("*.cpp")) if not path.name.startswith("cuda")]
    objects: dict[Path, Path] = {}
    seconds: dict[Path, list[float]] = {}
    for _, source in product(range(repeats), [*sources, HERE / "ops.cpp"]):
        flags = [TARGET] if source.parent == HERE else []
        objects[source], taken = compile_object(source, folder, *flags)
        seconds.setdefault(source, []).append(taken)
    cost = {source: statistics.median(values) for source, values in seconds.items()}
    ours = link(folder / "libours.so", [*kernels, *(objects[source] for source in sources)], "-lc10", "-ltorch_cpu")
    stable = link(folder / "libstable.so", [*kernels, objects[HERE / "ops.cpp"]], "-ltorch_cpu")
    same = sum(cost[source] for source in sources if source.name in SAME_WORK)
    print(f"\n| CPU seconds to compile | csrc/ops: {sum(cost[source] for source in sources):.1f} |", end="")
    print(f" {', '.join(SAME_WORK)} of it: {same:.1f} | stable ABI: {cost[HERE / 'ops.cpp']:.1f} |")
    print(f"| KiB of the library | csrc/ops: {ours.stat().st_size >> 10} | | stable: {stable.stat().st_size >> 10} |")
    return stable


def make_cases() -> list[tuple[str, tuple[Any, ...], Any]]:
    """Calls and what the ordinary library answers; the linear where it has its own kernel, not torch's product."""
    ops = torch.ops.squish
    cases: list[tuple[str, tuple[Any, ...], Any]] = []
    torch.manual_seed(0)
    for dtype, group_size in product((torch.float32, torch.bfloat16, torch.float16, torch.float64), (2, 32, 64)):
        packed, scales = ops.quantize_nf4(torch.randn(130, 192).to(dtype), group_size)
        some: list[tuple[str, tuple[Any, ...]]] = [
            ("quantize_nf4", (torch.randn(192, 130).to(dtype), 2)),
            ("quantize_nf4", (torch.randn(192, 66).to(dtype).t(), group_size)),
            ("dequantize_nf4", (packed, scales, group_size)),
        ]
        if dtype != torch.float64:
            x, bias = torch.randn(6, 192).to(dtype), torch.randn(130)
            some += [("linear_nf4", (x[:m], packed, scales, bias, group_size)) for m in (1, 5, 6)]
        cases += [(name, args, getattr(ops, name)(*args)) for name, args in some]
    return cases


def compare(ours: str, stable: Path, pythons: Sequence[str], folder: Path) -> None:
    """One column for each library and interpreter; the rows are what check.py asks."""
    cases = folder / "cases.pt"
    torch.save(make_cases(), cases)
    columns: list[dict[str, str]] = []
    for namespace, library in (("squish", ours), ("squish_stable", stable)):
        for python in [sys.executable] if namespace == "squish" else [sys.executable, *pythons]:
            words = [python, str(HERE / "check.py"), namespace, str(library), str(cases)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
            columns.append(json.loads(done.stdout))
            columns[-1][""] = f"{namespace}: {columns[-1]['']}"
    print()
    for number, name in enumerate(columns[0]):
        print(f"| {name} | " + " | ".join(column.get(name, "") for column in columns) + " |")
        if number == 0:
            print("|---" * (len(columns) + 1) + "|")


def repeated(call: Callable[..., object], *args: Any) -> Call:
    def candidate(_: int) -> None:
        for _ in range(CALLS):
            call(*args)

    return candidate


def print_calls(title: str, calls: dict[str, tuple[Any, ...]], rounds: int) -> None:
    print(f"\n| us for a call, {title} | csrc/ops | stable ABI | ratio |\n|---|---|---|---|")
    for name, args in calls.items():
        pair = {
            space: repeated(getattr(getattr(torch.ops, space), name), *args) for space in ("squish", "squish_stable")
        }
        times = alternate(pair, rounds)
        ours, stable = (times.milliseconds(space) * 1e3 / CALLS for space in pair)
        print(f"| {name} | {ours:.2f} | {stable:.2f} | {times.ratio('squish_stable', 'squish'):.2f} |")


def time_calls(rounds: int) -> None:
    """The bare kernels, and then the linear with the gradient that the stable ABI can only have from Python."""
    w, x = torch.randn(64, 64), torch.randn(1, 64)
    packed, scales = torch.ops.squish.quantize_nf4(w, 64)
    linear = {"linear_nf4": (x, packed, scales, None, 64)}
    calls: dict[str, tuple[Any, ...]] = {"quantize_nf4": (w, 64), "dequantize_nf4": (packed, scales, 64), **linear}
    with torch.inference_mode():
        print_calls("64 x 64, M = 1, inference mode", calls, rounds)
    torch.library.register_autograd(
        "squish_stable::linear_nf4", lambda ctx, dy: (dy, None, None, None, None), setup_context=lambda *_, **__: None
    )
    with torch.no_grad():
        print_calls("no_grad, gradient from torch.library.register_autograd", linear, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="*", default=[], help="interpreters with other versions of torch")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=3, help="how often each file is compiled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(conditions())
    with tempfile.TemporaryDirectory() as name:
        stable = build(Path(name), options.repeats)
        compare(library_path(), stable, options.pythons, Path(name))
        torch.ops.load_library(str(stable))
        time_calls(options.rounds)


if __name__ == "__main__":
    main()
