"""Everything that needs a GPU, in one command: builds for the GPU at hand, tests, looks for bad accesses, measures.

    python scripts/gpu_check.py [--output build/gpu-check] [--only tests,benchmark] [--dry-run]

It needs a GPU, torch for CUDA, an nvcc of torch's CUDA major, numpy and pytest, and fetches nothing. Every stage is a
process of its own with its own time limit, all together end after seven minutes, and each prints one line of JSON when
it is done; one that fails hides none. Two files remain in the output folder: gpu-check.json and gpu-check.md, with PASS
or FALLS SHORT for each goal. The exit code is 0 if every stage passed (a goal that falls short fails no stage), 1 if
not, 2 if there is no GPU. Without one, --dry-run goes as far as such a machine allows: it collects the tests and writes
a report without figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BYTES = ("arithmetic", "quantize", "dequantize", "survey")  # of tests/cuda
MODELS = ("tests/cuda/test_models.py", "tests/cuda/test_convert.py")
WHOLE_LIMIT = 420  # seconds
TAIL = 1500  # characters of a stage's output that are kept if it fails


@dataclass
class Stage:
    """One process. ``limit``: seconds; without ``tool`` on the PATH and ``modules`` for Python the stage is skipped."""

    name: str
    command: list[str]
    limit: int
    tool: str = ""
    modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What a stage has left: its line of JSON."""

    stage: str
    state: str  # passed, failed, timed out, skipped
    seconds: float
    detail: str


def architecture() -> str:
    """The compute capability of the GPU at hand, as nvcc's option wants it: "9.0"."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


def stages(output: Path, dry: bool) -> list[Stage]:
    python = sys.executable
    this = str(ROOT / "scripts" / "gpu_check.py")
    benchmark = [python, str(ROOT / "scripts" / "gpu_benchmark.py"), "--output", str(output / "benchmark.json")]
    if dry:
        return [
            Stage("tests", [python, "-m", "pytest", "-q", "--collect-only", "tests/cuda"], 120),
            Stage("benchmark", [*benchmark, "--dry-run"], 60),
        ]
    build = {"SQUISH_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture(), "MAX_JOBS": str(os.cpu_count() or 1)}
    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 150, environment=build),
        pytest("bytes", *map("tests/cuda/test_{}.py".format, BYTES), limit=120),
        pytest("linear", "tests/cuda/test_linear.py", "tests/cuda/test_fused_linear.py", limit=120),
        pytest("streams and graphs", "tests/cuda/test_streams_and_graphs.py", limit=120),
        pytest("models", *MODELS, limit=120, modules=("safetensors", "zstandard")),
        Stage("memcheck", sanitizer("memcheck", this), 90, tool="compute-sanitizer"),
        Stage("racecheck", sanitizer("racecheck", this), 90, tool="compute-sanitizer"),
        Stage("benchmark", benchmark, 150),
    ]


def pytest(name: str, *files: str, limit: int, modules: tuple[str, ...] = ()) -> Stage:
    """Tests that must run on the GPU: what they lack is a failure. Those that execute the kernels on the CPU do not."""
    parallel = ["-n", "4"] if find_spec("xdist") else []
    quiet = ["-q", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings"]
    options = [*quiet, *parallel, "-m", "not builds"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    return Stage(name, command, limit, modules=modules, environment={"SQUISH_REQUIRE": "cuda"})


def sanitizer(tool: str, script: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, script, "--small-case"]


def run(stage: Stage, log: Path, seconds_left: float) -> Result:
    if stage.tool and not shutil.which(stage.tool):
        return Result(stage.name, "skipped", 0, f"{stage.tool} is not on the PATH")
    missing = [name for name in stage.modules if find_spec(name) is None]
    if missing:
        return Result(stage.name, "skipped", 0, f"{', '.join(missing)} not installed")
    if seconds_left <= 0:
        return Result(stage.name, "timed out", 0, f"not run, for the {WHOLE_LIMIT} seconds of all stages are over")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | stage.environment
    begin, limit = time.monotonic(), min(stage.limit, seconds_left)
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
    text = log.read_text(errors="replace").strip()
    last = text.splitlines()[-1] if text else ""
    return Result(stage.name, state, round(time.monotonic() - begin, 1), last if state == "passed" else text[-TAIL:])


def small_case() -> None:
    """Every operator once or twice on small tensors, against the CPU: short enough for compute-sanitizer."""
    import torch

    import squish_nf4  # noqa: F401  it registers the operators

    ops = torch.ops.squish
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, d, group_size in ((5, 192, 64), (3, 128, 16), (7, 126, 3), (37, 512, 128)):
            w = torch.randn(n, d).to(dtype)
            expected = ops.quantize_nf4(w, group_size)
            packed, scales = ops.quantize_nf4(w.cuda(), group_size)
            assert torch.equal(packed.cpu(), expected[0])
            assert torch.equal(scales.cpu(), expected[1])
            dense = ops.dequantize_nf4(packed, scales, group_size, dtype=dtype)
            assert torch.equal(dense.cpu(), ops.dequantize_nf4(*expected, group_size, dtype=dtype))
            survey = ops._survey_nf4(w.cuda(), packed, scales, group_size)
            assert torch.equal(survey.cpu(), ops._survey_nf4(w, *expected, group_size))
            for m in (1, 5, 16, 33):
                x = torch.randn(m, d - 1 if group_size == 64 else d).to(dtype).cuda()
                y = ops.linear_nf4(x, packed, scales, None, group_size).double()
                exact = x.double() @ dense.double()[:, : x.shape[1]].t()
                assert float((y - exact).norm() / exact.norm()) < 0.02
    torch.cuda.synchronize()
    print("every operator agrees with the CPU")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    facts = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "python": platform.python_version()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts["commit"] = os.environ.get("GPU_CHECK_COMMIT") or commit.stdout.strip() or "unknown"
    try:
        import torch
    except ImportError:
        return facts
    facts |= {"torch": str(torch.__version__), "CUDA": str(torch.version.cuda)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"GPU": properties.name, "multiprocessors": str(properties.multi_processor_count)}
        facts["L2"] = f"{properties.L2_cache_size >> 20} MiB"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
        facts["driver"] = driver.stdout.splitlines()[0] if driver and driver.stdout else "unknown"
    return facts


def report(facts: dict[str, str], results: list[Result], records: list[dict[str, Any]]) -> str:
    """The Markdown page: goals first, then stages, then every figure."""
    from scripts import gpu_benchmark

    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for goal in gpu_benchmark.goals(records):
        measured = "-" if goal.measured is None else f"{goal.measured:.2f}"
        lines.append(f"| {goal.text} | {goal.wanted:.2f} | {measured} | {goal.verdict} |")
    lines += ["", "| stage | | seconds | |", "|---|---|---|---|"]
    for result in results:
        detail = result.detail.replace("|", "/").replace("\n", " ")[:300]
        lines.append(f"| {result.stage} | {result.state} | {result.seconds} | {detail} |")
    return "\n".join([*lines, "", *gpu_benchmark.table(records), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--only", default="", help="stages to run, by name, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="on a machine without a GPU: as far as it goes")
    parser.add_argument("--small-case", action="store_true", help="what compute-sanitizer watches")
    arguments = parser.parse_args()
    if arguments.small_case:
        small_case()
        return 0
    facts = machine()
    if "GPU" not in facts and not arguments.dry_run:
        print(
            "gpu-check: no GPU was found. It wants one (compute capability 7.5 or newer), torch for CUDA, an nvcc of "
            "torch's CUDA major version, numpy and pytest; --dry-run goes as far as this machine allows."
        )
        return 2
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmark.json").unlink(missing_ok=True)
    chosen = [name.strip() for name in arguments.only.split(",") if name.strip()]
    results, begin = [], time.monotonic()
    for stage in stages(output, arguments.dry_run):
        if chosen and stage.name not in chosen:
            continue
        built = all(result.state == "passed" for result in results if result.stage == "build")
        if built:
            left = WHOLE_LIMIT - (time.monotonic() - begin)
            results.append(run(stage, output / f"{stage.name.replace(' ', '-')}.log", left))
        else:
            results.append(Result(stage.name, "failed", 0, "not run, for the build failed"))
        print(json.dumps(asdict(results[-1])), flush=True)
    measured = output / "benchmark.json"
    records = json.loads(measured.read_text()) if measured.exists() else []
    whole = {"machine": facts, "stages": [asdict(result) for result in results], "records": records}
    (output / "gpu-check.json").write_text(json.dumps(whole, indent=1) + "\n")
    (output / "gpu-check.md").write_text(report(facts, results, records))
    print((output / "gpu-check.md").read_text())
    return int(any(result.state not in ("passed", "skipped") for result in results))


if __name__ == "__main__":
    sys.exit(main())
