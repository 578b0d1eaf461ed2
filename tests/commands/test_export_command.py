"""``squish-nf4 export``: the real sentence encoder end to end, and models that a function returns."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from squish_nf4.commands.cli import app
from squish_nf4.commands.demo.model import model_folder
from squish_nf4.doctor.self_test import number_of_threads
from squish_nf4.torchscript import export as torchscript
from tests.support.models import eager_minilm, minilm_calls, require_minilm
from tests.support.processes import assert_one_sentence, squish
from tests.support.scripts import run_here

pytestmark = pytest.mark.sweeps  # what is exported is tried in a fresh process

MODELS = """
import torch
import squish_nf4
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 8)
    def forward(self, x):
        return self.second(self.first(x))

def dense():
    return Model().eval()

def with_example():
    return dense(), torch.randn(2, 64)

def with_nf4():
    model = dense()
    squish_nf4.quantize_model(model, only="first")
    return model, (torch.randn(2, 64),)

def in_training():
    return Model()

def no_model():
    return dense(), 3

def without_linear():
    return squish_nf4.NF4Packer(32).eval(), torch.randn(2, 64)

def broken():
    return {}["absent"]

def wrong_example():
    class Fails(Model):
        def forward(self, x):
            return {}["absent"]
    return Fails().eval(), torch.randn(2, 64)

number = 3
"""


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["export", *(str(arg) for arg in args)])


def said(result: Result) -> str:
    return " ".join(result.output.split())


# --- the sentence encoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """What the command printed, and what it wrote."""
    require_minilm()
    path = tmp_path_factory.mktemp("export") / "minilm.pt"
    with warnings.catch_warnings(), number_of_threads(1):
        warnings.simplefilter("ignore")  # of other packages, long after they were imported
        return invoke(model_folder(), path), path


def test_minilm_is_exported_and_the_summary_says_how(minilm: tuple[Result, Path]) -> None:
    result, path = minilm
    assert result.exit_code == 0, result.output
    text = said(result)
    assert f"{path}, 54.1 MB, traced" in text
    assert "37 layers to NF4, 3 left alone: 90.9 MB -> 53.9 MB, 1.7 x smaller" in text
    assert "attention_mask the same) -> last_hidden_state (batch, tokens, width)" in text
    assert "run in a fresh process with only the op library: the same bits as eager" in text
    assert "also at another size of dimension 0 and dimension 1 of the inputs" in text
    assert text.count("TorchScript is deprecated") == 1


def test_exported_minilm_gives_eagers_bits_at_other_sizes_and_masks(minilm: tuple[Result, Path]) -> None:
    program = load(minilm[1])
    eager = eager_minilm()
    for ids, mask in minilm_calls((1, 1), (1, 12), (3, 7), (4, 40)):
        with torch.no_grad():
            assert torch.equal(program(ids, mask), eager(ids, mask))


def load(path: Path) -> Any:
    with torchscript.torchs_warning_off():
        return torch.jit.load(path)


# --- models that a function returns -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models in it, for commands that try their file in this process."""
    monkeypatch.setattr(torchscript, "try_in_fresh_process", run_here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    (tmp_path / "some_models.py").write_text(MODELS)
    return tmp_path


def test_a_function_is_found_in_the_working_directory_as_a_user_starts_it(tmp_path: Path) -> None:
    (tmp_path / "some_models.py").write_text(MODELS)
    done = squish("export", "some_models:with_example", "model.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "2 layers to NF4, 0 left alone: 28.1 kB -> 4.3 kB" in done.stdout
    assert "the same bits as eager" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.pt", "some_models.py"]


def test_quantizing_options_reach_the_model(here: Path) -> None:
    for options, groups in (
        ([], {"first.scales": (96, 1), "second.scales": (8, 2)}),
        (["--group-size", "32"], {"first.scales": (96, 2), "second.scales": (8, 3)}),
        (["--skip", "second"], {"first.scales": (96, 1)}),
        (["--only", "second"], {"second.scales": (8, 2)}),
    ):
        result = invoke("some_models:dense", "m.pt", "--overwrite", *options)
        assert result.exit_code == 0, result.output
        state = load(here / "m.pt").state_dict()
        assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("scales")} == groups


def test_a_model_that_came_with_nf4_layers_is_written_as_it_is(here: Path) -> None:
    result = invoke("some_models:with_nf4", "m.pt")
    assert "1 NF4 layer, as it came" in said(result)
    assert load(here / "m.pt").second.weight.dtype == torch.float32


def test_a_model_without_linear_layers_is_not_said_to_be_smaller(here: Path) -> None:
    text = said(invoke("some_models:without_linear", "m.pt"))
    assert "Model calls squish::quantize_nf4; nothing to quantize, 0 left alone Checked" in text
    assert "smaller" not in text


def test_without_example_inputs_it_says_that_it_was_not_run(here: Path) -> None:
    assert "not run: there were no example inputs" in said(invoke("some_models:dense", "m.pt"))


REFUSED = {
    "absent": "absent is neither a directory nor package.module:function",
    "no_models:dense": "there is no module no_models, neither installed nor in ",
    "some_models:absent": "some_models has no function absent",
    "some_models:number": "some_models has no function number",
    "some_models:no_model": "has to return a module, or (module, example_inputs); got (Model, int)",
    "some_models:in_training": "the model is in training mode",
    "some_models:broken": "some_models:broken failed: KeyError: 'absent' (some_models.py:34)",
    "some_models:wrong_example": "some_models:wrong_example could not be exported: KeyError: 'absent' (some_models.py:",
    "failing_models:f": "failing_models cannot be imported: ZeroDivisionError: division by zero (failing_models.py:1)",
    "unreadable_models:f": "cannot be imported: SyntaxError: invalid syntax (unreadable_models.py, line 1)",
    "folder": "folder has no config.json: it is not the directory of a Hugging Face model",
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_source_that_cannot_be_exported_is_one_sentence(source: str, here: Path) -> None:
    (here / "folder").mkdir()
    (here / "failing_models.py").write_text("1 / 0")
    (here / "unreadable_models.py").write_text("def")
    result = invoke(source, "m.pt")
    assert result.exit_code == 1
    assert result.stderr.startswith("squish-nf4: ")
    assert len(result.stderr.splitlines()) == 1
    assert REFUSED[source] in result.stderr
    assert not (here / "m.pt").exists()


def test_options_that_would_change_nothing_are_refused(here: Path) -> None:
    for option in (["--group-size", "64"], ["--skip", "x"], ["--only", "first"]):
        result = invoke("some_models:with_nf4", "m.pt", *option)
        assert result.exit_code == 1
        assert "has NF4 layers already; --group-size, --skip and --only would change nothing" in result.stderr


def test_a_file_is_replaced_only_with_overwrite_and_that_is_said_first(here: Path) -> None:
    (here / "m.pt").write_text("old")
    result = invoke("some_models:no_model", "m.pt")  # it would be refused, too, had it been called
    assert (result.exit_code, result.stdout) == (1, "")
    assert "m.pt exists; --overwrite replaces it" in result.stderr
    assert (here / "m.pt").read_text() == "old"
    assert invoke("some_models:dense", "m.pt", "--overwrite").exit_code == 0
    assert load(here / "m.pt")(torch.randn(2, 64)).shape == (2, 8)


def test_a_directory_that_cannot_be_written_into_is_named_before_any_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    result = invoke("some_models:broken", here / "m.pt")
    assert result.stderr == f"squish-nf4: export_torchscript: cannot write into the directory {here}\n"


def test_a_failed_export_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torchscript.TorchScriptError("export_torchscript: no")

    monkeypatch.setattr(torchscript, "try_in_fresh_process", fail)
    result = invoke("some_models:dense", "m.pt")
    assert (result.exit_code, result.stderr) == (1, "squish-nf4: export_torchscript: no\n")


def test_without_transformers_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "hide").mkdir()
    done = squish("export", tmp_path / "model", tmp_path / "m.pt", without=(tmp_path / "hide", ["transformers"]))
    assert_one_sentence(done, "this needs the package transformers, which is not installed; type: pip install")
