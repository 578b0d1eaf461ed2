"""AOTInductor packages, from Python: compiled once, run at other sizes here and where only the op library is loaded.

A package calls our operators through torch's dispatcher, so theirs are the bits of eager mode; what inductor fuses
around them may differ in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim, export

from squish_nf4 import NF4Linear, library_path
from tests.support.models import BATCH_AND_TOKENS, Requantize, quantized_llama, some_tokens
from tests.support.processes import run_python

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("inductor")]
OPTIONS = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # the compiler's time, not ours
SIZES = [(1, 1), (2, 9), (1, 40), (7, 30)]


def packaged(model: nn.Module, args: tuple[Tensor, ...], shapes: Any, path: Path) -> Path:
    program = export(model, args, dynamic_shapes=shapes)
    return Path(aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS))


@pytest.fixture(scope="module")
def llama(inductor: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The model, and its package with a dynamic batch and length."""
    torch.manual_seed(20260801)
    model = quantized_llama(layers=2)
    path = tmp_path_factory.mktemp("aoti") / "llama.pt2"
    return model, packaged(model, (some_tokens(),), BATCH_AND_TOKENS, path)


def test_a_model_gives_the_numbers_of_eager_mode_at_every_batch_and_length(llama: tuple[nn.Module, Path]) -> None:
    model, path = llama
    run = aoti_load_package(path)
    for size in SIZES:
        tokens = some_tokens(*size)
        torch.testing.assert_close(run(tokens), model(tokens).detach(), rtol=1e-5, atol=1e-5)


ONLY_THE_OP_LIBRARY = """
import sys, torch
library, package, data = sys.argv[1:]
torch.ops.load_library(library)
run = torch._inductor.aoti_load_package(package)
for tokens, expected in torch.load(data):
    torch.testing.assert_close(run(tokens), expected, rtol=1e-5, atol=1e-5)
assert "squish_nf4" not in sys.modules
print("close")
"""


def test_a_package_runs_where_only_the_op_library_is_loaded(llama: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = llama
    inputs = [some_tokens(*size) for size in SIZES]
    torch.save([(tokens, model(tokens).detach()) for tokens in inputs], tmp_path / "data")
    assert run_python(ONLY_THE_OP_LIBRARY, library_path(), path, tmp_path / "data") == "close\n"


def test_a_package_without_the_op_library_names_the_missing_operator(llama: tuple[nn.Module, Path]) -> None:
    code = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    assert "squish::linear_nf4" in run_python(code, llama[1], check=False)


@pytest.fixture(scope="module")
def layer(inductor: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[NF4Linear, Callable[..., Tensor]]:
    torch.manual_seed(20260801)
    layer = NF4Linear(65, 33, group_size=32).eval()
    path = tmp_path_factory.mktemp("aoti") / "layer.pt2"
    return layer, aoti_load_package(packaged(layer, (torch.randn(4, 5, 65),), BATCH_AND_TOKENS, path))


def test_a_layer_gives_the_bits_of_eager_mode(layer: tuple[NF4Linear, Callable[..., Tensor]]) -> None:
    eager, run = layer
    for size in [(0, 3), *SIZES]:
        x = torch.randn(*size, 65)
        assert torch.equal(run(x), eager(x))


def test_a_package_checks_its_inputs_only_if_it_is_told_to(layer: tuple[NF4Linear, Callable[..., Tensor]]) -> None:
    """torch's rule (docs/compile-and-export.md): the operator takes a 66th column, which meets a weight of zero."""
    eager, run = layer
    x = torch.randn(2, 3, 66)
    assert torch.equal(run(x), eager(x[..., :65].contiguous()))
    with pytest.raises(RuntimeError, match="linear_nf4: x has 97 columns but packed holds 96"):
        run(torch.randn(2, 3, 97))


def test_every_operator_runs_in_a_package(tmp_path: Path) -> None:
    """Two results, an optional dtype, a bias that is None: what torch hands to operators that it does not know."""
    model, args = Requantize(), (torch.randn(10, 64), torch.randn(4, 61))
    run = aoti_load_package(packaged(model, args, ({0: Dim("n")}, {0: Dim("batch")}), tmp_path / "all.pt2"))
    for n, batch in [(1, 1), (33, 0), (70, 40)]:
        args = (torch.randn(n, 64), torch.randn(batch, 61))
        for found, expected in zip(run(*args), model(*args), strict=True):
            assert torch.equal(found, expected)


def test_no_cache_is_left_outside_of_the_run(tmp_path: Path) -> None:
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path.parent.parent))
