"""NF4Packer: the bytes of quantize_nf4, as a module without parameters or gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from squish_nf4 import NF4Packer, library_path, quantize_nf4
from tests.support import reference
from tests.support.helpers import through_pickle, through_torch_save
from tests.support.processes import run_python

JIT = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]+. is deprecated:FutureWarning")


def test_bytes_equal_the_definition(rng: np.random.Generator) -> None:
    w = rng.standard_normal((7, 192), dtype=np.float32)
    packed, scales = NF4Packer()(torch.from_numpy(w))
    expected_packed, expected_scales = reference.quantize(w, 64)  # 64 is the default
    np.testing.assert_array_equal(packed.numpy(), expected_packed)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)


@pytest.mark.parametrize("group_size", [1, 2, 3, 16, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_it_is_quantize_nf4(dtype: torch.dtype, group_size: int) -> None:
    w = torch.randn(5, 96, dtype=dtype)
    for found, expected in zip(NF4Packer(group_size)(w), quantize_nf4(w, group_size), strict=True):
        assert torch.equal(found, expected)


@JIT
@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_results_have_no_gradient_even_of_a_parameter(scripted: bool) -> None:
    packer = torch.jit.script(NF4Packer(32)) if scripted else NF4Packer(32)
    for w in (nn.Parameter(torch.randn(6, 64)), torch.randn(6, 64, requires_grad=True) * 2):
        for result in packer(w):
            assert not result.requires_grad
            assert result.grad_fn is None


def test_it_holds_nothing() -> None:
    packer = NF4Packer(32)
    assert list(packer.parameters()) == []
    assert packer.state_dict() == {}
    assert repr(packer) == "NF4Packer(group_size=32)"
    assert packer.half().to("meta").group_size == 32


@pytest.mark.parametrize("group_size", [0, -1])
def test_a_group_size_below_one_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"NF4Packer: group_size must be at least 1, got {group_size}"):
        NF4Packer(group_size)


def test_non_finite_weights_are_refused_and_said_where() -> None:
    w = torch.randn(6, 64)
    w[2, 40] = float("-inf")
    with pytest.raises(ValueError, match=r"^NF4Packer: w holds -inf at row 2, column 40;"):
        NF4Packer(16)(w)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, through_pickle])
def test_copies_pack_alike(again: object) -> None:
    w = torch.randn(6, 64)
    assert torch.equal(again(NF4Packer(16))(w)[1], NF4Packer(16)(w)[1])  # type: ignore[operator]


def test_torch_save_and_load() -> None:
    w = torch.randn(6, 64)
    assert torch.equal(through_torch_save(NF4Packer(16))(w)[0], NF4Packer(16)(w)[0])


def test_it_exports_and_compiles_without_a_look_at_the_values() -> None:
    w = torch.randn(6, 64)
    expected = NF4Packer(16)(w)
    program = torch.export.export(NF4Packer(16), (w,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    compiled = torch.compile(NF4Packer(16), fullgraph=True, backend="aot_eager")
    for run in (program, compiled):
        assert all(torch.equal(a, b) for a, b in zip(run(w), expected, strict=True))
        assert bool(run(torch.full((6, 64), float("nan")))[1].isnan().all())


ONLY_THE_OP_LIBRARY = """
import sys, torch
library, module, data = sys.argv[1:]
torch.ops.load_library(library)
w, packed, scales = torch.load(data)
found = torch.jit.load(module)(w)
assert "squish_nf4" not in sys.modules
assert torch.equal(found[0], packed) and torch.equal(found[1], scales)
assert not found[1].requires_grad and found[1].grad_fn is None
print("equal")
"""


@JIT
def test_a_scripted_packer_runs_where_only_the_op_library_is_loaded(tmp_path: Path) -> None:
    w = torch.randn(6, 64)
    torch.jit.script(NF4Packer(16)).save(str(tmp_path / "packer.pt"))
    torch.save((w.clone().requires_grad_(), *NF4Packer(16)(w)), tmp_path / "data.pt")
    done = run_python(ONLY_THE_OP_LIBRARY, library_path(), tmp_path / "packer.pt", tmp_path / "data.pt")
    assert done == "equal\n"


@JIT
def test_a_scripted_packer_marks_non_finite_groups_instead_of_refusing() -> None:
    w = torch.randn(6, 64)
    w[2, 40] = float("nan")
    _, scales = torch.jit.script(NF4Packer(16))(w)
    assert scales.isnan().nonzero().tolist() == [[2, 2]]


@JIT
def test_a_traced_packer_runs_at_other_sizes_and_does_not_look() -> None:
    traced = torch.jit.trace(NF4Packer(16), torch.randn(6, 64))
    w = torch.randn(9, 32)
    assert all(torch.equal(a, b) for a, b in zip(traced(w), NF4Packer(16)(w), strict=True))
    assert bool(traced(torch.full((9, 32), float("nan")))[1].isnan().all())
