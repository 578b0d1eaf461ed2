"""The op library under the address and undefined-behaviour sanitizers, with torch: the operator tests on such a build.

setup.py builds a copy of the sources as it always does, with the sanitizers added; Python gets their runtime preloaded.
The copy has two more operators with faults in them: a sanitizer that does not report those would report nothing.
It takes minutes, and is a target of its own: `make test-sanitized`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support import ROOT, processes
from tests.support.compiling import COMPILER
from tests.support.helpers import require

pytestmark = pytest.mark.sanitized

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr"
# What calls operators, in one process. Left out: what compiles in workers of its own, what forks, what measures.
TESTS = (
    "operators/test_operators",
    "operators/test_misaligned",
    "kernels/test_linear",
    "operators/test_autograd",
    "operators/test_errors",
    "nn/test_packer",
    "kernels/test_dequantize",
)
LEFT_OUT = "opcheck or compile or forced_isa or thread or every_path or exports or holds_a_dense_weight"

FAULTS = """
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <memory>

namespace {
int64_t heap(int64_t size) {
  const std::unique_ptr<char[]> block(new char[size]());
  return block[size];
}
int64_t shift(int64_t by) { return 1 << by; }
}  // namespace

TORCH_LIBRARY(squish_faults, m) {
  m.def("heap(int size) -> int", &heap);
  m.def("shift(int by) -> int", &shift);
}
"""
FAULTY_CALL = "import squish_nf4, sys, torch; torch.ops.squish_faults.{}(40); print('not noticed')"


def runtime(name: str) -> str | None:
    """The path of a shared library that comes with the compiler."""
    done = processes.run([*COMPILER, f"-print-file-name={name}"])
    path = Path(done.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sources, built in place with the sanitizers."""
    require("sanitizers", None not in map(runtime, ("libasan.so", "libubsan.so")), "the compiler has no libasan.so")
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("csrc", "squish_nf4", "tests"):
        ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    setup = (ROOT / "setup.py").read_text()
    assert '"-O3"' in setup
    (folder / "setup.py").write_text(
        setup.replace('"-O3"', '"-O1"')
    )  # it compiles in half the time, and checks as much
    (folder / "csrc" / "ops" / "faults.cpp").write_text(FAULTS)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    flags = {"CFLAGS": SANITIZE, "LDFLAGS": SANITIZE}
    done = processes.run(command, cwd=folder, SQUISH_CUDA="0", MAX_JOBS="2", PYTHONPATH="", **flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run(folder: Path, *args: str) -> CompletedProcess[str]:
    preload = ":".join(str(runtime(name)) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    # Leaks are Python's and torch's: they keep what they need until the end.
    env = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return processes.run([sys.executable, *args], cwd=folder, PYTHONPATH=str(folder), **env)


@pytest.mark.parametrize(
    ("fault", "report"), [("heap", "heap-buffer-overflow"), ("shift", "runtime error: shift exponent 40")]
)
def test_a_fault_in_an_operator_is_reported(copy: Path, fault: str, report: str) -> None:
    done = run(copy, "-c", FAULTY_CALL.format(fault))
    assert done.returncode != 0
    assert report in done.stderr
    assert "not noticed" not in done.stdout


def test_operator_tests_pass(copy: Path) -> None:
    files = [f"tests/{name}.py" for name in TESTS]
    done = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({LEFT_OUT})", *files
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 300, done.stdout[-500:]
