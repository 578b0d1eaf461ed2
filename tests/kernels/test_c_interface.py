"""csrc/c: the library that its CMake file builds, from a C99 program and from Python's ctypes as any language's."""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support.compiling import NATIVE
from tests.support.cpp_programs import required_cmake
from tests.support.helpers import ISAS, ForcedIsa, require, require_isa
from tests.support.processes import run

pytestmark = pytest.mark.builds

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STRICT_C = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT}")


def build(folder: Path, *options: str) -> Path:
    """The library, built and installed as the file's first lines say; returns the prefix."""
    cmake = required_cmake()
    for command in (
        [cmake, "-S", ROOT / "csrc" / "c", "-B", folder / "build", *options],
        [cmake, "--build", folder / "build", "-j2"],
        [cmake, "--install", folder / "build", "--prefix", folder],
    ):
        done = run([str(word) for word in command])
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("c"))
    assert (folder / "include" / "squish_nf4.h").is_file()
    return compile_program(folder, "cc")


def compile_program(folder: Path, compiler: str, *flags: str) -> Path:
    sources = [str(NATIVE / "c_interface.c"), str(folder / "lib" / "libsquish_nf4_c.a")]
    done = run([compiler, *STRICT_C, *sources, *flags, "-lstdc++", "-lm", "-o", str(folder / "program")])
    assert done.returncode == 0, done.stderr
    return folder / "program"


@pytest.mark.parametrize("isa", ISAS)
def test_a_c_program_passes_on_every_path(program: Path, isa: str) -> None:
    require_isa(isa)
    done = run([program], SQUISH_NF4_ISA=isa)
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr


def test_the_program_of_the_docs_prints_what_they_say(program: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "native" / "c-interface.md").read_text()
    source = tmp_path / "app.c"
    source.write_text(text.split("```c\n")[1].split("```")[0])
    prefix = program.parent
    library = str(prefix / "lib" / "libsquish_nf4_c.a")
    built = run(["cc", str(source), f"-I{prefix}/include", library, "-lstdc++", "-lm", "-o", str(tmp_path / "app")])
    assert built.returncode == 0, built.stderr
    assert f"prints `{run([tmp_path / 'app']).stdout.strip()}`" in text


def test_a_c_program_passes_under_the_undefined_behaviour_sanitizer(tmp_path: Path) -> None:
    """It reports a value that is read or written at an address that does not fit its type."""
    sanitize = "-fsanitize=undefined -fno-sanitize-recover=all"
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    linked = run(["c++", *sanitize.split(), str(probe), "-o", str(tmp_path / "probe")])
    require("sanitizers", linked.returncode == 0, f"c++ does not link the sanitizers: {linked.stderr[-300:]}")
    folder = build(tmp_path, f"-DCMAKE_CXX_FLAGS={sanitize}")
    done = run([compile_program(folder, "cc", *sanitize.split())])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ISAS


def test_a_path_that_is_unknown_is_a_status(program: Path) -> None:
    done = run([program], SQUISH_NF4_ISA="sse9")
    assert done.returncode == 3, done.stderr


def test_a_c_program_passes_on_arm64(tmp_path: Path) -> None:
    compiler, qemu = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    require("arm64", shutil.which(compiler) is not None and qemu is not None, f"{compiler} or qemu-aarch64 is missing")
    folder = build(tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_SYSTEM_NAME=Linux")
    done = run([str(qemu), compile_program(folder, "aarch64-linux-gnu-gcc", "-static")])
    assert (done.returncode, done.stdout) == (0, "scalar\n"), done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shared"), "-DBUILD_SHARED_LIBS=ON") / "lib" / "libsquish_nf4_c.so"


def test_it_needs_neither_torch_nor_python_and_shows_only_its_own_names(shared: Path) -> None:
    require("binutils", shutil.which("nm") is not None, "nm is not installed")
    needed = run(["readelf", "-d", shared]).stdout
    assert "torch" not in needed
    assert "python" not in needed
    listed = run(["nm", "-D", "--defined-only", shared]).stdout
    names = {line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "T"}
    ours = {name for name in names if name.startswith("squish_nf4_")}
    assert ours == {
        *(f"squish_nf4_{name}" for name in ("quantize", "dequantize", "message", "levels", "isa", "c_version")),
        "squish_nf4_first_non_finite",
    }
    assert all("squish3cpu" in name for name in names - ours)  # selection() and its like, which the op library shows


def test_the_header_and_the_refusal_name_every_path(shared: Path) -> None:
    header = (ROOT / "csrc" / "c" / "squish_nf4.h").read_text()
    assert f"SQUISH_NF4_ISA={'|'.join(ISAS)} caps" in header
    quoted = [f'"{isa}"' for isa in ISAS]
    assert f"{', '.join(quoted[:-1])} or {quoted[-1]}: the path in use" in header
    message = ctypes.CDLL(str(shared)).squish_nf4_message
    message.restype = ctypes.c_char_p
    bad_isa = int(re.findall(r"SQUISH_NF4_BAD_ISA = (\d+)", header)[0])
    names = f"{', '.join(ISAS[:-1])} or {ISAS[-1]}"
    assert message(bad_isa).decode() == f"SQUISH_NF4_ISA must be {names}, and one that this processor has"


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    library.squish_nf4_quantize.argtypes = [pointer, number, size, size, size, size, size, pointer, pointer]
    library.squish_nf4_dequantize.argtypes = [pointer, pointer, size, size, size, size, size, number, pointer]
    return library


def in_threads(work: Callable[[int, int], int], n: int, threads: int = 3) -> None:
    """work(first_row, last_row) for ranges that cover n rows, at once."""
    statuses: list[int] = []
    cuts = [n * t // threads for t in range(threads + 1)]
    pool = [threading.Thread(target=lambda a=a, b=b: statuses.append(work(a, b))) for a, b in pairwise(cuts)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert statuses == [0] * threads


def compare_with_operators(path: Path, w: torch.Tensor, group_size: int) -> None:
    library = load(path)
    n, d = w.shape
    packed, scales = torch.empty(n, d // 2, dtype=torch.uint8), torch.empty(n, d // group_size)
    in_threads(
        lambda first, last: library.squish_nf4_quantize(
            w.data_ptr(), DTYPES[w.dtype], n, d, group_size, first, last, packed.data_ptr(), scales.data_ptr()
        ),
        n,
    )
    expected_packed, expected_scales = torch.ops.squish.quantize_nf4(w, group_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(scales, expected_scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(n, d, dtype=dtype)
        in_threads(
            lambda first, last, out=out: library.squish_nf4_dequantize(
                packed.data_ptr(),
                scales.data_ptr(),
                n,
                d,
                group_size,
                first,
                last,
                DTYPES[out.dtype],
                out.data_ptr(),
            ),
            n,
        )
        assert torch.equal(out, torch.ops.squish.dequantize_nf4(packed, scales, group_size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "group_size"), [(96, 32), (60, 3), (14, 1), (130, 130)])
def test_bytes_are_those_of_the_operators(
    forced_isa: ForcedIsa, shared: Path, dtype: torch.dtype, d: int, group_size: int
) -> None:
    w = torch.randn(37, d, dtype=torch.float64).to(dtype)
    w[0], w[1, :2] = 0, 1e-40
    forced_isa(compare_with_operators, shared, w, group_size)
