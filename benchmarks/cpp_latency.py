"""A call of a scripted NF4 model: eager Python, TorchScript from Python, and from C++ (examples/libtorch_app).

The three take turns. A turn is the median of many calls; for C++ that is a process of its own. The outputs are compared
first: the C++ program has to give the bits of eager.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import squish_nf4
from benchmarks.timing import conditions
from tests.support.models import quantized_llama, some_tokens

ROOT = Path(__file__).resolve().parent.parent


def build_app(folder: Path) -> Path:
    cmake = Path(sys.executable).parent / "cmake"
    source = ROOT / "examples" / "libtorch_app"
    options = [f"-DCMAKE_PREFIX_PATH={squish_nf4.cmake_prefix_path()}", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([cmake, "-S", source, "-B", folder, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", folder, "--target", "script_app"], check=True, stdout=subprocess.DEVNULL)
    return folder / "script_app"


def layer(rows: int, columns: int, dtype: torch.dtype) -> nn.Module:
    return squish_nf4.NF4Linear.from_linear(nn.Linear(columns, rows, bias=False, dtype=dtype)).eval()


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "NF4Linear 64 x 64, float32, M = 1": (layer(64, 64, torch.float32), torch.randn(1, 64)),
        "NF4Linear 4096 x 4096, bfloat16, M = 1": (
            layer(4096, 4096, torch.bfloat16),
            torch.randn(1, 4096, dtype=torch.bfloat16),
        ),
        "Llama-shaped, 3 blocks of width 64, 1 token": (quantized_llama(), some_tokens(1, 1)),
    }


def median_microseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for number in range(-10, repeats):
        start = time.perf_counter()
        call()
        if number >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1000, help="calls in one turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
    print(conditions())
    print(
        f"Microseconds of a call, median of {options.rounds} turns of {options.repeats} calls each, inference mode.\n"
    )
    print("| | eager Python | scripted, Python | scripted, C++ | C++ / eager |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        app = build_app(Path(folder) / "build")
        for number, (name, (model, x)) in enumerate(cases().items()):
            files = [Path(folder) / f"{number}.{what}.pt" for what in ("model", "x", "y")]
            print(f"| {name} | {' | '.join(compare(app, files, model, x, options.rounds, options.repeats))} |")


def compare(app: Path, files: list[Path], model: nn.Module, x: Tensor, rounds: int, repeats: int) -> list[str]:
    squish_nf4.export_torchscript(model, files[0], x)
    torch.save(x, files[1])
    scripted = torch.jit.load(files[0])

    def in_cpp() -> float:
        command = [str(app), *map(str, files), str(repeats)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
        return float(done.stdout)

    in_cpp()
    with torch.inference_mode():
        if not torch.equal(torch.load(files[2]), model(x)):
            raise SystemExit("C++ does not give the bits of eager")
        turns = [
            (
                median_microseconds(lambda: model(x), repeats),
                median_microseconds(lambda: scripted(x), repeats),
                in_cpp(),
            )
            for _ in range(rounds)
        ]
    medians = [f"{statistics.median(column):.1f}" for column in zip(*turns, strict=True)]
    return [*medians, f"{statistics.median(cpp / eager for eager, _, cpp in turns):.2f}"]


if __name__ == "__main__":
    main()
