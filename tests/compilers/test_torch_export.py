"""torch.export of layers and models: any batch and length, saved and loaded, the bits of eager mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

import squish_nf4
from squish_nf4 import NF4Linear, library_path
from tests.support.models import BATCH_AND_TOKENS, Requantize, quantized_llama, some_tokens
from tests.support.processes import run_python

pytestmark = pytest.mark.sweeps  # what is exported is tried in a fresh process

SIZES = [(1, 1), (2, 9), (1, 40), (7, 30)]


def exported_llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ExportedProgram]:
    model = quantized_llama(dtype)
    return model, export(model, (some_tokens(),), dynamic_shapes=BATCH_AND_TOKENS)


@pytest.mark.parametrize(("in_features", "group_size"), [(64, 64), (65, 32), (7, 64)])
def test_a_layer_with_padding_exports_with_a_dynamic_batch(in_features: int, group_size: int) -> None:
    model = nn.Sequential(NF4Linear(in_features, 33, group_size=group_size), nn.GELU(), NF4Linear(33, 9, bias=False))
    program = export(model.eval(), (torch.randn(4, 5, in_features),), dynamic_shapes=BATCH_AND_TOKENS)
    assert "squish.linear_nf4" in program.graph_module.code  # the packed bytes, not a decoded weight
    assert {t.dtype for t in program.state_dict.values()} == {torch.uint8, torch.float32}
    for batch, tokens in [(0, 3), *SIZES]:
        x = torch.randn(batch, tokens, in_features)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_exports_with_a_dynamic_batch_and_length(dtype: torch.dtype) -> None:
    model, program = exported_llama(dtype)
    for size in SIZES:
        tokens = some_tokens(*size)
        assert torch.equal(program.module()(tokens), model(tokens))


def test_an_exported_program_refuses_another_width() -> None:
    program = export(NF4Linear(65, 9, group_size=32), (torch.randn(4, 65),), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(AssertionError, match=r"x\.size\(\)\[1\] == 65|Guard failed"):
        program.module()(torch.randn(4, 66))


def test_a_program_with_strict_mode_is_the_same() -> None:
    model = quantized_llama()
    program = export(model, (some_tokens(),), dynamic_shapes=BATCH_AND_TOKENS, strict=True)
    tokens = some_tokens(3, 20)
    assert torch.equal(program.module()(tokens), model(tokens))


# --- saved and loaded -------------------------------------------------------------------------------------------------

ONLY_THE_OP_LIBRARY = """
import sys, torch
library, program, data = sys.argv[1:]
torch.ops.load_library(library)
model = torch.export.load(program).module()
for tokens, expected in torch.load(data):
    assert torch.equal(model(tokens), expected)
assert "squish_nf4" not in sys.modules
print("equal")
"""


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 reads a program from bytes
def test_a_saved_program_runs_here_and_where_only_the_op_library_is_loaded(tmp_path: Path) -> None:
    model, program = exported_llama()
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [some_tokens(*size) for size in SIZES]
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert all(torch.equal(loaded(tokens), model(tokens)) for tokens in inputs)
    torch.save([(tokens, model(tokens).detach()) for tokens in inputs], tmp_path / "data.pt")
    files = (tmp_path / "model.pt2", tmp_path / "data.pt")
    assert run_python(ONLY_THE_OP_LIBRARY, library_path(), *files) == "equal\n"


def test_a_saved_program_is_as_small_as_the_packed_model(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(512, 512, bias=False))
    squish_nf4.quantize_model(dense)
    torch.export.save(export(dense, (torch.randn(3, 512),)), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size < 512 * 512 * 4.5 / 8 + 40_000


# --- weights as inputs of a program -----------------------------------------------------------------------------------


def test_all_operators_export_with_dynamic_rows_and_batch() -> None:
    args = (torch.randn(10, 64), torch.randn(4, 61))
    program = export(Requantize(), args, dynamic_shapes=({0: Dim("n")}, {0: Dim("batch")}))
    for n, batch in [(1, 1), (0, 3), (33, 0), (70, 40)]:
        args = (torch.randn(n, 64), torch.randn(batch, 61))
        for found, expected in zip(program.module()(*args), Requantize()(*args), strict=True):
            assert torch.equal(found, expected)
