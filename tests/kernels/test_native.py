"""csrc/nf4 and csrc/cpu without torch or Python: tests/native/test_*.cpp, one program, built in several ways."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from squish_nf4 import _C
from tests.support import ROOT
from tests.support.compiling import COMPILER, NATIVE, compile_objects, kernel_sources, link
from tests.support.helpers import require
from tests.support.processes import run

pytestmark = pytest.mark.builds

SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ARM64_COMPILER = "aarch64-linux-gnu-g++"
X86_FILES = [path.name for path in kernel_sources() if path.name.startswith("avx")]


def build(folder: Path, flags: Sequence[str], compiler: Sequence[str] = COMPILER) -> Path:
    sources = [*kernel_sources(), *sorted(NATIVE.glob("test_*.cpp"))]
    return link(folder / "core", compile_objects(folder, sources, flags, compiler), flags, compiler)


def paths_of_this_cpu() -> list[str]:
    return list(_C.cpu_isas(available=True))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, kernel_objects: dict[str, Path]) -> Path:
    """Compiled as setup.py compiles the kernels."""
    folder = tmp_path_factory.mktemp("core")
    tests = compile_objects(folder, sorted(NATIVE.glob("test_*.cpp")), ["-O3"])
    return link(folder / "core", [*kernel_objects.values(), *tests])


def test_kernels_pass_as_they_are_shipped(program: Path) -> None:
    done = run([program], SQUISH_NF4_ISA=_C.cpu_isa())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == paths_of_this_cpu()


def test_kernels_pass_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = run([*COMPILER, *SANITIZE, probe, "-o", tmp_path / "probe"])
    require("sanitizers", built.returncode == 0, f"{COMPILER[0]} does not link the sanitizers: {built.stderr[-300:]}")
    done = run([build(tmp_path, SANITIZE)], SQUISH_NF4_ISA=_C.cpu_isa())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == paths_of_this_cpu()


def test_threads_share_a_matrix_without_a_race_that_the_thread_sanitizer_sees(tmp_path: Path) -> None:
    flags = ("-O1", "-g", "-fsanitize=thread")
    sources = [*kernel_sources(), ROOT / "csrc" / "c" / "squish_nf4.cpp", NATIVE / "threads.cpp"]
    program = link(tmp_path / "threads", compile_objects(tmp_path, sources, flags), flags)
    fixed = [tool, "-R"] if (tool := shutil.which("setarch")) else []  # it wants its shadow where it expects it
    clean, racing = run([*fixed, program]), run([*fixed, program, "race"])
    require("sanitizers", "unexpected memory mapping" not in clean.stderr, "the thread sanitizer does not run here")
    assert clean.returncode == 0, clean.stderr
    assert racing.returncode != 0
    assert "data race" in racing.stderr


@pytest.mark.parametrize(("fault", "report"), [("heap", "heap-buffer-overflow"), ("shift", "runtime error")])
def test_sanitizers_report_what_they_are_there_for(tmp_path: Path, fault: str, report: str) -> None:
    faults = {
        "heap": "auto* p = new unsigned char[16 + argc]; return p[16 + argc];",
        "shift": "return 1 << (31 + argc);",
    }
    source = tmp_path / "fault.cpp"
    source.write_text(f"int main(int argc, char**) {{ {faults[fault]} }}\n")
    built = run([*COMPILER, *SANITIZE, source, "-o", tmp_path / "fault"])
    require("sanitizers", built.returncode == 0, f"{COMPILER[0]} does not link the sanitizers: {built.stderr[-300:]}")
    done = run([tmp_path / "fault"])
    assert done.returncode != 0
    assert report in done.stderr


@pytest.fixture(scope="module")
def arm64_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("arm64", shutil.which(ARM64_COMPILER) is not None, f"{ARM64_COMPILER} is not installed")
    return build(tmp_path_factory.mktemp("arm64"), ["-O3", "-static"], [ARM64_COMPILER])


def run_arm64(program: Path, **environment: str) -> tuple[int, str, str]:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    require("arm64", qemu is not None, "qemu-aarch64 is not installed")
    done = run([str(qemu), program], **environment)
    return done.returncode, done.stdout, done.stderr


def test_scalar_path_passes_on_arm64(arm64_program: Path) -> None:
    status, output, errors = run_arm64(arm64_program)
    assert status == 0, errors
    assert output.split() == ["scalar"]


def test_arm64_refuses_an_x86_path(arm64_program: Path) -> None:
    status, output, _ = run_arm64(arm64_program, SQUISH_NF4_ISA="avx2")
    assert status == 3
    assert output == "SQUISH_NF4_ISA=avx2 is not supported by this CPU; the best it has is scalar\n"


def test_x86_files_are_empty_on_arm64(tmp_path: Path) -> None:
    require("arm64", shutil.which(ARM64_COMPILER) is not None, f"{ARM64_COMPILER} is not installed")
    sources = [ROOT / "csrc" / "cpu" / name for name in (*X86_FILES, "scalar.cpp")]
    symbols = []
    for item in compile_objects(tmp_path, sources, ["-O3"], [ARM64_COMPILER]):
        listed = run(["aarch64-linux-gnu-nm", item])
        assert listed.returncode == 0, listed.stderr
        symbols.append(listed.stdout)
    assert symbols[:-1] == [""] * len(X86_FILES)
    assert "kScalarCodecs" in symbols[-1]


@pytest.mark.parametrize(
    ("cpu", "paths"), [("Nehalem", ["scalar"]), ("Haswell", ["scalar", "avx2"])], ids=["Nehalem", "Haswell"]
)
def test_an_older_x86_cpu_gets_the_paths_it_can_run(program: Path, cpu: str, paths: list[str]) -> None:
    qemu = shutil.which("qemu-x86_64")
    require("qemu-x86_64", qemu is not None, "qemu-x86_64 is not installed")
    done = run([str(qemu), "-cpu", cpu, program])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == paths


@pytest.mark.parametrize(("cpu", "best"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_a_path_this_cpu_has_not_is_refused_by_name(program: Path, cpu: str, best: str) -> None:
    qemu = shutil.which("qemu-x86_64")
    require("qemu-x86_64", qemu is not None, "qemu-x86_64 is not installed")
    done = run([str(qemu), "-cpu", cpu, program], SQUISH_NF4_ISA="avx512")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout == f"SQUISH_NF4_ISA=avx512 is not supported by this CPU; the best it has is {best}\n"
