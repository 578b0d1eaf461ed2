"""export_torchscript of models that keep a state: neither they nor the file have what calls of the export left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squish_nf4 import NF4Linear, export_torchscript
from squish_nf4.torchscript.model_state import state_kept
from squish_nf4.torchscript.refusals import TorchScriptError
from tests.support.scripts import load

pytestmark = pytest.mark.usefixtures("here")
X = torch.randn(2, 64)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = NF4Linear(64, 8)
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4, 8))
        self.calls = 0


class InPlace(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        with torch.no_grad():
            self.cache[:2] = self.layer(x)[:2]
        return self.layer(x) * self.n + self.cache.sum()


class Assigns(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        self.calls = self.calls + 1
        return self.layer(x) * self.n * self.calls


class InPlaceTraced(Stateful):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.n += 1
        return self.layer(x) * self.n


class AssignsTraced(Stateful):
    """What it keeps does not reach its results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.n = self.n + 1
        self.seen.append(x)
        return self.layer(x)


class CountsTraced(Stateful):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


CHANGED = "calls of the model change {}; the file holds what was there before the export"
ASSIGNED = "calls of the model assign {}; a trace does not, and goes on with what was there"


@pytest.mark.parametrize(
    ("kind", "route", "note"),
    [
        (InPlace, "scripted", CHANGED.format("n, cache")),
        (Assigns, "scripted", CHANGED.format("calls, n")),
        (InPlaceTraced, "traced", CHANGED.format("n")),
        (AssignsTraced, "traced", ASSIGNED.format("n, seen.0, seen.1")),
    ],
)
def test_neither_the_model_nor_the_file_is_changed(kind: type[Stateful], route: str, note: str, tmp_path: Path) -> None:
    model = kind().eval()
    model.n.fill_(5)
    n, versions = model.n, {name: t._version for name, t in model.layer.state_dict().items()}
    report = export_torchscript(model, tmp_path / "m.pt", X)
    assert (report.route, report.same_bits) == (route, True)  # at the second call too, which finds another state
    assert report.notes == (note,)
    assert model.n is n
    assert (int(model.n), model.calls, int(model.cache.count_nonzero())) == (5, 0, 0)
    assert not getattr(model, "seen", [])
    assert {name: t._version for name, t in model.layer.state_dict().items()} == versions
    program = load(tmp_path / "m.pt")
    assert (int(program.n), int(program.cache.count_nonzero())) == (5, 0)
    assert torch.equal(program(X), model(X))


def test_a_trace_at_another_size_starts_from_the_state_of_the_file(tmp_path: Path) -> None:
    assert export_torchscript(InPlaceTraced().eval(), tmp_path / "m.pt", X).free_dimensions == (0,)


def test_a_trace_whose_results_need_what_was_assigned_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = CountsTraced().eval()
    with pytest.raises(TorchScriptError, match=f"is wrong at the second call: .*; {ASSIGNED.format('calls')}; nothing"):
        export_torchscript(model, tmp_path / "m.pt", X)
    assert model.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_raises_is_put_back_too(tmp_path: Path) -> None:
    class Raises(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            raise KeyError("no")

    model = Raises().eval()
    with pytest.raises(KeyError, match="no"):
        export_torchscript(model, tmp_path / "m.pt", X)
    assert int(model.n) == 0


def test_a_model_that_writes_into_a_parameter_is_refused(tmp_path: Path) -> None:
    class Writes(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.bias += 1
            return self.layer(x)

    with pytest.raises(ValueError, match=r"wrote into its parameter layer\.bias, which is not undone; .* be a buffer"):
        export_torchscript(Writes().eval(), tmp_path / "m.pt", X)
    assert list(tmp_path.iterdir()) == []


def test_a_backward_that_is_to_come_is_not_spoiled(tmp_path: Path) -> None:
    model, x = InPlaceTraced().eval(), X.clone().requires_grad_()
    y = model.layer(x)
    export_torchscript(model, tmp_path / "m.pt", X)
    y.sum().backward()
    assert x.grad is not None


def test_lists_dicts_attributes_and_inference_tensors_are_put_back() -> None:
    model = Stateful()
    with torch.inference_mode():
        model.register_buffer("inference", torch.zeros(2))
    model.tensor, model.items, model.rows = torch.zeros(2), {"a": [1]}, [torch.zeros(2)]
    with state_kept(model) as state:
        model.tensor += 1
        model.rows[0].add_(1)
        model.rows.append(torch.ones(1))
        model.items["a"].append(2)
        model.items["b"] = 1
        model.new = model.n
        with torch.inference_mode():
            model.inference.add_(1)
        del model.calls
        assert state.written() == ["inference", "tensor", "rows.0"]
        assert state.assigned() == ["calls", "new", "items.b", "items.a.1", "rows.1"]
    assert model.items == {"a": [1]}
    assert (model.calls, len(model.rows), hasattr(model, "new")) == (0, 1, False)
    assert not any(t.any() for t in (model.tensor, model.rows[0], model.inference))
