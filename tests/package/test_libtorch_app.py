"""examples/libtorch_app as a user builds it: find_package, three programs without Python, and Python's own bytes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export

import squish_nf4
from squish_nf4.commands.demo.model import model_folder
from tests.support import ROOT, processes
from tests.support.compiling import NATIVE
from tests.support.cpp_programs import build_without_cmake, required_cmake
from tests.support.models import eager_minilm, minilm_calls, quantized_llama, require_minilm, some_tokens
from tests.support.processes import squish

pytestmark = pytest.mark.builds

PACKAGE = Path(squish_nf4.__file__).parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a build with spaces")
    cmake = required_cmake()
    options = [f"-DCMAKE_PREFIX_PATH={squish_nf4.cmake_prefix_path()}", "-DCMAKE_CXX_FLAGS=-O1 -Wall -Wextra"]
    for command in (
        [cmake, "-S", ROOT / "examples" / "libtorch_app", "-B", folder, *options],
        [cmake, "--build", folder, "-j2"],
    ):
        done = processes.run(command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def run(apps: Path) -> Run:
    def run_app(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return processes.run([apps / name, *(str(arg) for arg in args)], **environment)

    return run_app


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return quantized_llama()


def test_a_scripted_llama_gives_pythons_bits(run: Run, llama: torch.nn.Module, tmp_path: Path) -> None:
    squish_nf4.export_torchscript(llama, tmp_path / "llama.pt", some_tokens())
    for batch, tokens in [(1, 1), (3, 20)]:
        x = some_tokens(batch, tokens)
        torch.save(x, tmp_path / "x.pt")
        done = run("script_app", tmp_path / "llama.pt", tmp_path / "x.pt", tmp_path / "y.pt", 3)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) >= 0
        assert torch.equal(torch.load(tmp_path / "y.pt"), llama(x))


def test_the_encoder_of_the_export_command_gives_pythons_bits(run: Run, tmp_path: Path) -> None:
    """Its two arguments are one saved tuple."""
    require_minilm()
    done = squish("export", model_folder(), tmp_path / "minilm.pt")
    assert done.returncode == 0, done.stderr
    eager = eager_minilm()
    for ids, mask in minilm_calls((1, 1), (3, 20)):
        torch.save((ids, mask), tmp_path / "x.pt")
        done = run("script_app", tmp_path / "minilm.pt", tmp_path / "x.pt", tmp_path / "y.pt")
        assert done.returncode == 0, done.stderr
        with torch.inference_mode():
            assert torch.equal(torch.load(tmp_path / "y.pt"), eager(ids, mask))


@pytest.fixture(scope="module")
def llama_package(llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti")
    program = export(llama, (some_tokens(),), dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens")},))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "llama.pt2")))


def test_a_llama_compiled_by_aot_inductor_gives_pythons_numbers(
    run: Run, llama: torch.nn.Module, llama_package: Path, tmp_path: Path
) -> None:
    for batch, tokens in [(2, 9), (3, 20)]:
        x = some_tokens(batch, tokens)
        torch.save(x, tmp_path / "x.pt")
        done = run("aoti_app", llama_package, tmp_path / "x.pt", tmp_path / "y.pt")
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), llama(x).detach(), atol=1e-5, rtol=1e-5)


def test_several_inputs_of_an_aot_inductor_model_are_one_saved_tuple(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Difference(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - y

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    inputs = (torch.randn(3), torch.randn(3))
    package = torch._inductor.aoti_compile_and_package(
        export(Difference(), inputs), package_path=str(tmp_path / "m.pt2")
    )
    torch.save(inputs, tmp_path / "x.pt")
    done = run("aoti_app", package, tmp_path / "x.pt", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), inputs[0] - inputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_quantized_weight_has_pythons_bytes(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    w = torch.randn(17, 96).to(dtype)
    torch.save(w, tmp_path / "w.pt")
    done = run("quantize_app", tmp_path / "w.pt", 48, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    packed, scales, decoded, gradient = torch.load(tmp_path / "out.pt")
    expected_packed, expected_scales = squish_nf4.quantize_nf4(w, 48)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(decoded, squish_nf4.dequantize_nf4(packed, scales, 48))
    torch.testing.assert_close(gradient, decoded.sum(0).expand(3, 96), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "group_size", "said"),
    [
        (torch.ones(4, 64), 48, "ValueError: quantize_nf4: w has 64 columns, not a multiple of group_size=48"),
        (torch.ones(4, 64, dtype=torch.int32), 32, "TypeError: quantize_nf4: w must be float32, bfloat16, float16 or"),
    ],
)
def test_errors_arrive_with_their_types(
    run: Run, tmp_path: Path, weight: torch.Tensor, group_size: int, said: str
) -> None:
    torch.save(weight, tmp_path / "w.pt")
    done = run("quantize_app", tmp_path / "w.pt", group_size, tmp_path / "out.pt")
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize("app", ["script_app", "aoti_app", "quantize_app"])
def test_a_program_says_how_it_is_used_and_what_is_missing(run: Run, tmp_path: Path, app: str) -> None:
    done = run(app)
    assert (done.returncode, done.stderr.split()[:2]) == (2, ["usage:", app])
    done = run(app, tmp_path / "no such file", 32, tmp_path / "out.pt")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{app}: cannot read {tmp_path}/no such file\n")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("app", "text"), [("script_app", "seven"), ("script_app", "7x"), ("quantize_app", ""), ("quantize_app", "9" * 20)]
)
def test_what_is_no_number_is_said_before_anything_is_written(run: Run, tmp_path: Path, app: str, text: str) -> None:
    torch.save(torch.ones(4, 64), tmp_path / "w.pt")
    args = {"script_app": ["m.pt", "x.pt", tmp_path / "y.pt", text], "quantize_app": [tmp_path / "w.pt", text, "y.pt"]}
    name = {"script_app": "REPEATS", "quantize_app": "GROUP_SIZE"}[app]
    done = run(app, *args[app])
    said = f"{app}: {name} must be a whole number of at most 64 bits, got '{text}'\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("app", ["script_app", "aoti_app", "quantize_app"])
def test_no_python_comes_into_the_process(
    run: Run, llama: torch.nn.Module, llama_package: Path, tmp_path: Path, app: str
) -> None:
    """What the loader maps, from start to end: the op library, a model that AOTInductor compiled, and no Python."""
    squish_nf4.export_torchscript(llama, tmp_path / "llama.pt")
    torch.save(torch.ones(2, 64), tmp_path / "w.pt")
    torch.save(some_tokens(), tmp_path / "x.pt")
    args = {
        "script_app": [tmp_path / "llama.pt", tmp_path / "x.pt"],
        "aoti_app": [llama_package, tmp_path / "x.pt"],
        "quantize_app": [tmp_path / "w.pt", 32],
    }[app]
    done = run(app, *args, tmp_path / "out.pt", LD_DEBUG="files")
    assert done.returncode == 0, done.stderr[-2000:]
    mapped = {Path(name).name for name in re.findall(r"calling init: (\S+)", done.stderr)}
    assert {"libsquish_nf4.so", "libtorch_cpu.so"} <= mapped
    assert any(name.endswith(".wrapper.so") for name in mapped) == (app == "aoti_app")
    assert not [name for name in mapped if "python" in name]


def test_the_one_line_of_the_docs_builds_too(tmp_path: Path) -> None:
    source = tmp_path / "app.cpp"
    source.write_text(
        "#include <squish_nf4/nf4.h>\n#include <ATen/ops/ones.h>\n"
        "int main() { return std::get<0>(squish::quantize_nf4(at::ones({2, 64}))).size(1) != 32; }\n"
    )
    build_without_cmake(source, tmp_path / "app", PACKAGE)
    assert processes.run([tmp_path / "app"]).returncode == 0


def test_an_undefined_tensor_is_named_and_an_undefined_bias_is_none(tmp_path: Path) -> None:
    build_without_cmake(NATIVE / "undefined_tensors.cpp", tmp_path / "app", PACKAGE)
    done = processes.run([tmp_path / "app"])
    assert done.returncode == 0, done.stderr
    refused = ["quantize_nf4: w", "dequantize_nf4: packed", "dequantize_nf4: scales", "dequantize_nf4: out"]
    refused += ["dequantize_nf4: packed"]
    sentence = "ValueError: {} must be a defined tensor, got an undefined one"
    linear = [sentence.format(f"linear_nf4: {name}") for name in ("x", "packed", "scales")]
    assert done.stdout.splitlines() == [sentence.format(name) for name in refused] + 6 * [*linear, "no error"]
