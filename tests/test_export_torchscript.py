"""export_torchscript: what it writes, checks, says, refuses. A deprecation warning of torch would fail each test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from squish_nf4 import NF4Linear, NF4Packer, export_torchscript, fresh_process, fresh_run, torchscript
from squish_nf4.example_calls import Call
from squish_nf4.fresh_process import FreshRun, TorchScriptError, compare
from tests.helpers import require, require_transformers
from tests.llama import quantized_llama, some_tokens


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


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NoTensor(Unscriptable):
    def forward(self, x: Tensor, **options: Any) -> Any:
        return self.layer(x), "text"


def run_here(file: Path, calls: Sequence[Call]) -> FreshRun:
    """As run_fresh, in this process: for tests of what is done with the results."""
    module = torch.jit.load(file)
    operators = [name for name in torch.jit.export_opnames(module) if name.startswith("squish::")]
    return FreshRun(tuple(operators), [fresh_run.call(module, *call) for call in calls])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript, "run_fresh", run_here)


def load(path: Path) -> Any:
    with torchscript.torchs_warning_off():
        return torch.jit.load(path)


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
    assert "keyword-only arguments with defaults (test_export_torchscript.py:" in report.why_traced
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


def test_a_process_that_cannot_load_the_file_is_an_error_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "library_path", lambda: "/no/such/library.so")
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
    assert "test_export_torchscript.py:" in from_torch
    assert report.free_dimensions == (1,)
    assert report.same_bits


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


# --- what the inputs and results may be -------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("container", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_are_a_tensor_a_sequence_or_keywords(container: Any, tmp_path: Path) -> None:
    example = container(torch.randn(2, 64))
    assert export_torchscript(NF4Linear(64, 8).eval(), tmp_path / "m.pt", example).same_bits


@pytest.mark.usefixtures("here")
def test_a_model_that_writes_into_its_inputs_does_not_write_into_the_example(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    example = torch.zeros(3)
    assert export_torchscript(InPlace().eval(), tmp_path / "m.pt", example).same_bits
    assert torch.equal(example, torch.zeros(3))


@pytest.mark.usefixtures("here")
def test_a_model_without_nf4_and_a_result_of_nan_are_noted(tmp_path: Path) -> None:
    report = export_torchscript(nn.Identity().eval(), tmp_path / "m.pt", torch.tensor([math.nan]))
    assert report.operators == ()
    assert report.notes == (
        "it calls no operator of squish_nf4: an ordinary TorchScript file",
        "results on the example inputs hold NaN, so that the comparison says little",
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_torchscript_cannot_take_is_one_sentence_with_the_lines(tmp_path: Path) -> None:
    with pytest.raises(TorchScriptError) as caught:
        export_torchscript(NoTensor().eval(), tmp_path / "m.pt", torch.randn(2, 64))
    text = str(caught.value)
    assert text.startswith(
        "export_torchscript: TorchScript cannot take this model; scripting: Compiled functions can't"
    )
    assert "(test_export_torchscript.py:" in text
    assert "; tracing: Only tensors, lists, tuples of tensors, or dictionary of tensors can be output" in text
    assert text.endswith("use torch.export or AOTInductor instead (docs/export.md)")
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
        TorchScriptError, match=r"the exported model is wrong: result differs from eager by up to 0\.\d+"
    ):
        export_torchscript(Random().eval(), path, torch.zeros(99), overwrite=True)
    assert path.read_text() == "old"
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
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device and has no values; load them first"):
        export_torchscript(nn.Sequential(nn.GELU(), NF4Linear(64, 8, device="meta")).eval(), tmp_path / "m.pt")
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
        (torch.compile(NF4Linear(64, 8)), r"compiled; pass the one that was given to torch\.compile"),
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


# --- when two results are equal ---------------------------------------------------------------------------------------

ONE = torch.tensor([1.0, -2.0])
NAN = torch.tensor([1.0, math.nan])
INTS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("found", "expected", "same_bits", "difference"),
    [
        (ONE, ONE, True, 0.0),
        ((ONE, {"a": [INTS]}), [ONE, {"a": (INTS,)}], True, 0.0),  # a list for a tuple: TorchScript's choice
        ({"a": 1, "b": None}, {"a": 1, "b": None}, True, 0.0),
        (NAN, NAN.clone(), True, 0.0),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False, 0.0),
        (ONE + 1e-5, ONE, False, 1e-5),
        (ONE.bfloat16(), torch.tensor([1.0, -2.015625]).bfloat16(), False, 0.015625),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), True, 0.0),
        (torch.empty(0, 3), torch.empty(0, 3), True, 0.0),
    ],
)
def test_equal_and_nearly_equal(found: Any, expected: Any, same_bits: bool, difference: float) -> None:
    agreement = compare(list(fresh_run.leaves(found)), list(fresh_run.leaves(expected)))
    assert agreement.misfit is None
    assert agreement.same_bits is same_bits
    assert agreement.difference == pytest.approx(difference, rel=0.02)


@pytest.mark.parametrize(
    ("found", "expected", "misfit"),
    [
        (ONE + 1e-3, ONE, "result differs from eager by up to 0.001"),
        (ONE, NAN, "result differs from eager by up to inf"),
        (INTS + 1, INTS, "result differs from eager by up to 1"),
        (ONE.double(), ONE, "result is torch.float64 (2,); eager gives torch.float32 (2,)"),
        ((ONE, ONE[:1]), (ONE, ONE), "result[1] is torch.float32 (1,); eager gives torch.float32 (2,)"),
        ({"a": True}, {"a": 1}, "result['a'] is True; eager gives 1"),
        ({"a": ONE}, {"b": ONE}, "it returns result['a']; eager returns result['b']"),
        ((), ONE, "it returns nothing; eager returns result"),
    ],
)
def test_different(found: Any, expected: Any, misfit: str) -> None:
    assert compare(list(fresh_run.leaves(found)), list(fresh_run.leaves(expected))).misfit == misfit


def test_an_error_is_a_difference() -> None:
    assert compare("RuntimeError: no", [("", ONE)]).misfit == "RuntimeError: no"


@pytest.mark.parametrize("which", [0, 1])
def test_rounding_is_allowed_and_stated_and_the_second_call_counts(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by(amount: float) -> Any:
        def run(file: Path, calls: Sequence[Call]) -> FreshRun:
            fresh = run_here(file, calls)
            output = fresh.outputs[which]
            assert not isinstance(output, str)
            fresh.outputs[which] = [(place, value + amount) for place, value in output]
            return fresh

        return run

    monkeypatch.setattr(torchscript, "run_fresh", off_by(2**-20))
    report = export_torchscript(nn.Identity().eval(), tmp_path / "m.pt", ONE)
    assert (report.same_bits, report.max_difference) == (False, 2**-20)
    assert "at most 9.54e-07 from eager" in str(report)
    monkeypatch.setattr(torchscript, "run_fresh", off_by(0.5))
    with pytest.raises(TorchScriptError, match=["is wrong: ", "is wrong at the second call: "][which]):
        export_torchscript(nn.Identity().eval(), tmp_path / "m2.pt", ONE)
