"""ONNX: the decomposed program with the packed bytes as they are, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import export

import squish_nf4
from tests.support.helpers import required_module
from tests.support.models import BATCH_AND_TOKENS, quantized_llama, some_tokens

pytestmark = pytest.mark.compiles
onnx, onnxruntime = required_module("onnx"), required_module("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(20260801)
    model = quantized_llama()
    path = tmp_path_factory.mktemp("onnx") / "llama.onnx"
    program = export(model, (some_tokens(),), dynamic_shapes=BATCH_AND_TOKENS)
    program = program.run_decompositions(squish_nf4.decompositions())
    torch.onnx.export(program, (), path, dynamo=True, optimize=False, verbose=False)
    return model, path


def weights(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every stored matrix, by name."""
    stored = onnx.load(path).graph.initializer
    return {t.name: (onnx.TensorProto.DataType.Name(t.data_type), tuple(t.dims)) for t in stored if len(t.dims) > 1}


def session(path: Path, **options: Any) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], **options)


def test_the_weights_stay_packed_bytes(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    onnx.checker.check_model(onnx.load(path))
    stored = weights(path)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            assert stored.pop(name) == ("UINT8", tuple(tensor.shape))
            assert stored.pop(name.replace("weight", "scales"))[0] == "FLOAT"
    left = sorted(shape for _, shape in stored.values())
    assert left == [(128, 64), (128, 64), (256, 2)]  # embedding, output head, and the levels: nothing was decoded


@pytest.mark.parametrize("disabled", [[], ["ConstantFolding"]], ids=["decoded at load", "decoded in every call"])
def test_onnxruntime_gives_the_numbers_of_eager_mode(exported: tuple[nn.Module, Path], disabled: list[str]) -> None:
    model, path = exported
    run = session(path, disabled_optimizers=disabled)
    for size in [(1, 1), (2, 9), (1, 40), (7, 30)]:
        tokens = some_tokens(*size)
        (found,) = run.run(None, {"tokens": tokens.numpy()})
        np.testing.assert_allclose(found, model(tokens).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("disabled", [[], ["ConstantFolding"]], ids=["by default", "told not to"])
def test_onnxruntime_decodes_the_weights_at_load_unless_it_is_told_not_to(
    exported: tuple[nn.Module, Path], disabled: list[str]
) -> None:
    options = onnxruntime.SessionOptions()
    optimized = exported[1].with_name("optimized.onnx")  # beside the file that holds the weights
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # it warns that the file is for this machine
    session(exported[1], sess_options=options, disabled_optimizers=disabled)
    assert {dtype for dtype, _ in weights(optimized).values()} == ({"FLOAT", "UINT8"} if disabled else {"FLOAT"})
