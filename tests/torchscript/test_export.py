"""export_torchscript: what it writes, checks, says, refuses. A deprecation warning of torch would fail each test."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from squish_nf4 import NF4Linear, NF4Packer, export_torchscript
from squish_nf4.torchscript import export as torchscript
from squish_nf4.torchscript import trial
from squish_nf4.torchscript.calls import Call
from squish_nf4.torchscript.refusals import TorchScriptError
from squish_nf4.torchscript.saving import save
from squish_nf4.torchscript.script_or_trace import torchs_warning_off
from squish_nf4.torchscript.trial import Trial
from tests.support.directories import make_a_socket
from tests.support.helpers import require, require_transformers
from tests.support.models import quantized_llama, some_tokens
from tests.support.processes import run_python
from tests.support.scripts import load, run_here

pytestmark = pytest.mark.sweeps  # what is exported is tried in a fresh process


class Unscriptable(nn.Module):
    """Keyword arguments are what TorchScript's compiler refuses first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = NF4Linear(64, 8)

    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.layer(x)


class TwoResults(Unscriptable):
    def forward(self, x: Tensor, scale: Tensor, **options: Any) -> dict[str, Tensor]:
        return {"y": self.layer(x) * scale, "x": x}


class RowByRow(Unscriptable):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return torch.stack([self.layer(x[row]) for row in range(int(x.size(0)))])


class FactorOfRows(Unscriptable):
    """Its trace keeps the number of rows in a factor that differs from 1 by little more than rounding."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.layer(x) * (1 + 1e-6 * int(x.size(0)))


class WrongBesideLarge(Unscriptable):
    """Its trace keeps a mean; the results that it spoils stand beside much larger ones."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.layer(x)
        return torch.cat([torch.full_like(y, 1e6), y * float(y.detach().mean())], -1)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NoTensor(Unscriptable):
    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.layer(x), "text"


# --- with a fresh process ---------------------------------------------------------------------------------------------


def test_a_llama_is_scripted_and_gives_the_same_bits_in_a_fresh_process(tmp_path: Path) -> None:
    model, path = quantized_llama(torch.bfloat16), tmp_path / "model.pt"
    report = export_torchscript(model, path, some_tokens())
    assert (report.path, report.bytes) == (path, path.stat().st_size)
    assert (report.route, report.why_traced) == ("scripted", None)
    assert (report.nf4_layers, report.operators) == (21, ("squish::linear_nf4",))
    assert (report.same_bits, report.max_difference) == (True, 0.0)
    assert report.notes == ()
    assert list(tmp_path.iterdir()) == [path]
    ids = some_tokens(3, 17)
    assert torch.equal(load(path)(ids), model(ids))
    assert str(report).splitlines()[:2] == [
        f"{path}: scripted, 21 NF4 layers, {path.stat().st_size:,} bytes",
        "run in a fresh process with only the op library: the same bits as eager",
    ]
    assert "TorchScript is deprecated" in str(report).splitlines()[2]


def test_without_example_inputs_the_file_is_loaded_and_not_run(tmp_path: Path) -> None:
    report = export_torchscript(NF4Packer(16).eval(), tmp_path / "packer.pt")
    assert report.operators == ("squish::quantize_nf4",)
    assert (report.nf4_layers, report.same_bits, report.max_difference) == (0, None, None)
    assert "not run: there were no example inputs" in str(report)
    w = torch.randn(4, 32)
    assert torch.equal(load(tmp_path / "packer.pt")(w)[0], NF4Packer(16)(w)[0])


def test_what_cannot_be_scripted_is_traced_and_tried_at_other_sizes(tmp_path: Path) -> None:
    model = TwoResults().eval()
    report = export_torchscript(model, tmp_path / "m.pt", {"x": torch.randn(2, 5, 64), "scale": torch.tensor(2.0)})
    assert report.route == "traced"
    assert report.why_traced is not None
    assert "keyword-only arguments with defaults (test_export.py:" in report.why_traced
    assert (report.same_bits, report.free_dimensions, report.notes) == (True, (0, 1), ())
    assert "the same bits as eager, also at another size of dimension 0 and dimension 1 of the inputs" in str(report)
    x = torch.randn(7, 1, 64)
    found = load(tmp_path / "m.pt")(x=x, scale=torch.tensor(3.0))
    assert torch.equal(found["y"], model(x, torch.tensor(3.0))["y"])


def test_the_fresh_process_has_the_callers_grad_mode(tmp_path: Path) -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> bool:
            return torch.is_grad_enabled()

    with torch.no_grad():
        assert export_torchscript(Mode().eval(), tmp_path / "m.pt", torch.ones(1)).same_bits


def test_the_fresh_process_has_the_callers_default_dtype(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3)

    torch.set_default_dtype(torch.float64)
    try:
        assert export_torchscript(Sum().eval(), tmp_path / "m.pt", torch.ones(3)).same_bits
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_file_may_have_the_longest_name_and_that_of_one_of_ours(tmp_path: Path) -> None:
    for name in ("n" * 250, "tasks", "results"):
        assert export_torchscript(NF4Linear(64, 8).eval(), tmp_path / name, torch.randn(2, 64)).same_bits
    assert len(list(tmp_path.iterdir())) == 3


def test_a_process_that_cannot_load_the_file_is_an_error_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "library_path", lambda: "/no/such/library.so")
    with pytest.raises(TorchScriptError, match=r"cannot run the file: OSError: .*/no/such/library\.so"):
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", torch.randn(2, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_a_gpu_is_run_on_it(tmp_path: Path) -> None:
    require("cuda", torch.cuda.is_available(), "no GPU")
    model = quantized_llama().cuda()
    report = export_torchscript(model, tmp_path / "m.pt", some_tokens().cuda())
    assert report.max_difference is not None
    assert {t.device.type for t in load(tmp_path / "m.pt").state_dict().values()} == {"cuda"}


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_trace_with_a_size_written_into_it_is_a_warning_and_a_note(tmp_path: Path) -> None:
    """At three rows it computes two, without a word."""
    with pytest.warns(UserWarning, match="export_torchscript: the trace holds for the example's size of dimension 0"):
        report = export_torchscript(RowByRow().eval(), tmp_path / "m.pt", torch.randn(2, 5, 64))
    bound, from_torch = report.notes
    assert bound.endswith("result is torch.float32 (2, 5, 8); eager gives torch.float32 (3, 5, 8)")
    assert "Python values (sizes, branches taken) that the model reads from tensors" in from_torch
    assert "test_export.py:" in from_torch
    assert report.free_dimensions == (1,)
    assert report.same_bits


@pytest.mark.usefixtures("here")
def test_another_size_whose_bits_are_not_eagers_is_not_said_to_have_them(tmp_path: Path) -> None:
    model, x = FactorOfRows().eval(), torch.randn(2, 64)
    report = export_torchscript(model, tmp_path / "m.pt", x)
    assert report.same_bits is False
    assert report.max_difference is not None
    assert 0 < report.max_difference < 1e-5
    assert f"at most {report.max_difference:.3g} from eager, also at another size of dimension 0" in str(report)
    assert report.notes[0].startswith("the bits are eager's at the sizes of the example, but not at another size of")
    assert torch.equal(load(tmp_path / "m.pt")(x), model(x))


@pytest.mark.usefixtures("here")
def test_large_values_do_not_hide_wrong_ones_at_another_size(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the trace holds for the example's size of dimension 0 of the inputs alone"):
        report = export_torchscript(WrongBesideLarge().eval(), tmp_path / "m.pt", torch.randn(2, 64))
    assert (report.same_bits, report.free_dimensions) == (True, ())
    assert report.verification.endswith("the same bits as eager, at the sizes of the example alone")


@pytest.mark.usefixtures("here")
def test_a_size_that_the_model_itself_is_bound_to_is_not_held_against_the_trace(tmp_path: Path) -> None:
    report = export_torchscript(Unscriptable().eval(), tmp_path / "m.pt", torch.randn(2, 64))
    assert (report.free_dimensions, report.notes) == ((0,), ())
    bound_to_both = export_torchscript(Unscriptable().eval(), tmp_path / "m2.pt", torch.randn(64))
    assert bound_to_both.verification.endswith("the same bits as eager, at the sizes of the example alone")


@pytest.mark.usefixtures("here")
def test_a_scripted_model_that_does_not_take_the_inputs_is_traced(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, pair):  # a Tensor, for all that TorchScript knows
            return pair[0] + pair[1]

    report = export_torchscript(Pair().eval(), tmp_path / "m.pt", ((torch.ones(3), torch.ones(3)),))
    assert report.route == "traced"
    assert report.why_traced is not None
    assert "forward() Expected a value of type 'Tensor" in report.why_traced


# --- what the results may be ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_model_without_nf4_and_a_result_of_nan_are_noted(tmp_path: Path) -> None:
    report = export_torchscript(nn.Identity().eval(), tmp_path / "m.pt", torch.tensor([math.nan]))
    assert report.operators == ()
    assert report.notes == (
        "it calls no operator of squish_nf4: an ordinary TorchScript file",
        "results on the example inputs hold NaN, so that the comparison says little",
    )


class Results(nn.Module):
    """Of kinds that cannot be subtracted or viewed as bytes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        return x > 0, torch.fft.fft(x).conj(), x.relu().to_sparse(), x.sum().item()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch 2.11, when it reads a result
def test_results_of_every_kind_are_compared(tmp_path: Path) -> None:
    for x in (torch.randn(2, 8), torch.full((2, 8), math.nan)):
        assert export_torchscript(Results().eval(), tmp_path / "m.pt", x, overwrite=True).same_bits


@pytest.mark.usefixtures("here")
def test_a_model_with_a_with_block_is_exported(tmp_path: Path) -> None:
    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = NF4Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.layer(x)

    report = export_torchscript(NoGrad().eval(), tmp_path / "m.pt", torch.randn(2, 64))
    assert report.operators == ("squish::linear_nf4",)


@pytest.mark.usefixtures("here")
def test_the_report_says_what_of_nf4_is_in_the_file(tmp_path: Path) -> None:
    with torchscript.torchs_warning_off():
        scripted = torch.jit.script(NF4Linear(64, 8).eval())
    for model, contents in (
        (nn.Sequential(scripted), "1 NF4 layer"),
        (NF4Packer(16), "calls squish::quantize_nf4"),
        (nn.Identity(), "0 NF4 layers"),
    ):
        report = export_torchscript(model.eval(), tmp_path / "m.pt", torch.randn(2, 64), overwrite=True)
        assert f"m.pt: scripted, {contents}, " in str(report)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_torchscript_cannot_take_is_one_sentence_with_the_lines(tmp_path: Path) -> None:
    with pytest.raises(TorchScriptError) as caught:
        export_torchscript(NoTensor().eval(), tmp_path / "m.pt", torch.randn(2, 64))
    text = str(caught.value)
    assert text.startswith(
        "export_torchscript: TorchScript cannot take this model; scripting: Compiled functions can't"
    )
    assert "(test_export.py:" in text
    assert "; tracing: Only tensors, lists, tuples of tensors, or dictionary of tensors can be output" in text
    assert text.endswith("use torch.export or AOTInductor instead (docs/compile-and-export.md)")
    assert "\n" not in text
    with pytest.raises(
        TorchScriptError, match=r"cannot be scripted: .*; give example_inputs to trace it, or use torch"
    ):
        export_torchscript(NoTensor().eval(), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_other_results_than_eagers_are_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_text("old")
    with pytest.raises(
        TorchScriptError,
        match=r"is wrong: result differs from eager by up to 0\.\d+; eager itself gives another result",
    ):
        export_torchscript(Random().eval(), path, torch.zeros(99), overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_fresh_process_executes_nothing_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a module of Python's nor one that torch looks for, in the working directory or on PYTHONPATH."""
    prepare_to_execute(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert export_torchscript(NF4Linear(64, 8).eval(), "m.pt", torch.randn(2, 64)).same_bits
    assert not (tmp_path / "executed").exists()


def test_the_fresh_process_takes_no_module_from_another_folder_that_python_or_torchs_place_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder on PYTHONPATH, or of a program that was started by -m and has left it."""
    prepare_to_execute(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", torch.randn(2, 64)).same_bits
    assert not (tmp_path / "executed").exists()


def prepare_to_execute(tmp_path: Path) -> None:
    for name in ("uuid", "json", "networkx", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})")


ON_A_FULL_DISK = """
import resource, sys, torch, warnings
from squish_nf4 import export_torchscript
class Repeat(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(weights), requires_grad=False)
    def forward(self, x):
        return x.repeat(int(self.weight.numel()))
weights, inputs = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # a larger file is an error of the system
export_torchscript(Repeat(weights).eval(), sys.argv[1], torch.randn(inputs))
"""


@pytest.mark.parametrize(
    ("weights", "inputs", "error"),
    [
        (100_000, 1, r"OSError: \[Errno 27\] {path} cannot be written: File too large"),
        (1, 100_000, r"OSError: \[Errno 27\] {path} cannot be written: File too large"),
        (300, 300, r".*TorchScriptError: .* a fresh process .* cannot run the file: OSError: .* File too large"),
    ],
    ids=["the file", "the inputs", "the results"],
)
def test_a_disk_that_does_not_take_it_is_an_error_and_nothing_is_left(
    tmp_path: Path, weights: int, inputs: int, error: str
) -> None:
    said = run_python(ON_A_FULL_DISK, tmp_path / "m.pt", weights, inputs, check=False)
    assert re.fullmatch(error.format(path=re.escape(str(tmp_path / "m.pt"))), said), said
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error() -> None:
    """And not the end of this process."""
    with torchs_warning_off(), pytest.raises(OSError, match="No space left on device"):
        save(torch.jit.script(NF4Linear(64, 8).eval()), Path("/dev/full"))


def test_the_file_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    (tmp_path / "torchs").mkdir()
    with torchs_warning_off():
        module = torch.jit.script(NF4Linear(64, 8).eval())
        save(module, tmp_path / "m.pt")
        torch.jit.save(module, tmp_path / "torchs" / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "torchs" / "m.pt").read_bytes()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str) -> None:
    path, link = tmp_path / "m.pt", tmp_path / "link.pt"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        make_a_socket(path)
    else:
        path = Path("/dev/full")
    before = path.stat()
    link.symlink_to(path)
    for given in (path, link):
        with pytest.raises(FileExistsError, match=rf"^export_torchscript: {given} is {kind}; only a regular file"):
            export_torchscript(NF4Linear(64, 8).eval(), given, overwrite=True)
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.usefixtures("here")
def test_what_becomes_a_device_during_the_export_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"

    def make_a_pipe(file: Path, calls: Sequence[Call]) -> Trial:
        os.mkfifo(path)
        return run_here(file, calls)

    monkeypatch.setattr(torchscript, "try_in_fresh_process", make_a_pipe)
    with pytest.raises(FileExistsError, match=r"m\.pt is a pipe; only a regular file is replaced"):
        export_torchscript(NF4Linear(64, 8).eval(), path, overwrite=True)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("here")
def test_a_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"m\.pt exists; overwrite=True replaces it"):
        export_torchscript(NF4Linear(64, 8).eval(), path)
    assert path.read_text() == "old"
    export_torchscript(NF4Linear(64, 8).eval(), str(path), overwrite=True)
    assert load(path)(torch.randn(2, 64)).shape == (2, 8)


@pytest.mark.usefixtures("here")
def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "folder" / "real.pt", tmp_path / "m.pt"
    link.symlink_to(file)
    with pytest.raises(FileExistsError):
        export_torchscript(NF4Linear(64, 8).eval(), link)
    assert export_torchscript(NF4Linear(64, 8).eval(), link, overwrite=True).bytes == file.stat().st_size
    assert link.is_symlink()
    assert list(file.parent.iterdir()) == [file]


def test_a_directory_that_cannot_be_written_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=f"^export_torchscript: cannot write into the directory {tmp_path}$"):
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt")


def test_autocast_is_refused(tmp_path: Path) -> None:
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"autocast is on, .*; export outside of it"):
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", torch.randn(2, 64))


def test_a_wrong_path_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the directory .*/absent does not exist"):
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "absent" / "m.pt")
    with pytest.raises(IsADirectoryError, match="is a directory; name a file in it"):
        export_torchscript(NF4Linear(64, 8).eval(), tmp_path, overwrite=True)


def test_training_mode_is_refused_and_not_changed(tmp_path: Path) -> None:
    model = nn.Sequential(NF4Linear(64, 8), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(
        ValueError, match=r"^export_torchscript: 1 of the model is in training mode, .* call model\.eval"
    ):
        export_torchscript(model, tmp_path / "m.pt", torch.randn(2, 64))
    assert model[1].training
    with pytest.raises(ValueError, match=r"^export_torchscript: the model is in training mode"):
        export_torchscript(model.train(), tmp_path / "m.pt")


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.bias is on the meta device and has no values; load them first"):
        export_torchscript(nn.Sequential(nn.GELU(), NF4Linear(64, 8, device="meta")).eval(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="weight is of a lazy module and has no values; call the model once"):
        export_torchscript(nn.LazyLinear(3).eval(), tmp_path / "m.pt")
    with FakeTensorMode():
        fake = nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match="weight is a FakeTensor; TorchScript saves plain tensors"):
        export_torchscript(fake, tmp_path / "m.pt")


def test_what_is_no_eager_module_is_refused(tmp_path: Path) -> None:
    with torchscript.torchs_warning_off():
        scripted = torch.jit.script(NF4Linear(64, 8))
    for model, message in (
        (some_tokens, r"model must be an nn\.Module, got function"),
        (scripted, r"the model is TorchScript already; torch\.jit\.save writes it"),
        (nn.Sequential(torch.compile(NF4Linear(64, 8))).eval(), r"0 of the model is compiled; use the one that"),
        (torch.compile(NF4Linear(64, 8)), r"the model is compiled; use the one that was given to torch\.compile"),
    ):
        with pytest.raises(TypeError, match=message):
            export_torchscript(model, tmp_path / "m.pt")


@pytest.mark.usefixtures("here")
def test_a_transformers_output_becomes_a_dict(tmp_path: Path) -> None:
    require_transformers()
    outputs = import_module("transformers.modeling_outputs")

    class Encoder(Unscriptable):
        def forward(self, x: Tensor, **options: Any) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=self.layer(x))

    assert export_torchscript(Encoder().eval(), tmp_path / "m.pt", torch.randn(2, 64)).same_bits
    assert list(load(tmp_path / "m.pt")(torch.randn(1, 64))) == ["last_hidden_state"]


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_rounding_is_allowed_and_stated_and_the_second_call_counts(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by(amount: float) -> Any:
        def run(file: Path, calls: Sequence[Call]) -> Trial:
            fresh = run_here(file, calls)
            output = fresh.outputs[which]
            assert not isinstance(output, str)
            fresh.outputs[which] = [(place, value + amount) for place, value in output]
            return fresh

        return run

    monkeypatch.setattr(torchscript, "try_in_fresh_process", off_by(2**-20))
    report = export_torchscript(nn.Identity().eval(), tmp_path / "m.pt", torch.tensor([1.0, -2.0]))
    assert (report.same_bits, report.max_difference) == (False, 2**-20)
    assert "at most 9.54e-07 from eager" in str(report)
    monkeypatch.setattr(torchscript, "try_in_fresh_process", off_by(0.5))
    with pytest.raises(TorchScriptError, match=["is wrong: ", "is wrong at the second call: "][which]):
        export_torchscript(nn.Identity().eval(), tmp_path / "m2.pt", torch.ones(2))
