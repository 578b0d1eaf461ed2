"""What can be known of CUDA without a GPU: shapes and devices with FakeTensor, and that nothing in the CUDA
sources or in a call would break the capture of a CUDA graph."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export

from squish_nf4 import NF4Linear, quantize_model, quantize_nf4
from tests.support import ROOT
from tests.support.helpers import require
from tests.support.models import VOCABULARY, Llama

OPS = torch.ops.squish


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.fixture
def cuda_torch() -> None:
    """For modules: a torch without CUDA cannot copy into a fake CUDA tensor, and so makes no nn.Linear there."""
    require("cuda-torch", torch.version.cuda is not None, f"torch {torch.__version__} is a CPU build")


def where(*tensors: Tensor) -> set[str]:
    return {tensor.device.type for tensor in tensors}


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_operator(dtype: torch.dtype) -> None:
    packed, scales = OPS.quantize_nf4(torch.empty(6, 64, dtype=dtype))
    dense = OPS.dequantize_nf4(packed, scales, dtype=dtype)
    out = OPS.dequantize_nf4.out(packed, scales, out=torch.empty(6, 64, dtype=dtype))
    y = OPS.linear_nf4(torch.empty(2, 3, 61, dtype=dtype), packed, scales, torch.empty(6))
    dx = OPS._linear_nf4_grad_x(y, packed, scales, 32, 61)
    assert where(packed, scales, dense, out, y, dx) == {"cuda"}
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == ((2, 3, 6), dtype, (2, 3, 61), dtype)


@pytest.mark.usefixtures("cuda_torch", "fake_cuda")
def test_a_model_is_quantized_and_run() -> None:
    model = Llama()
    report = quantize_model(model, group_size=32)
    assert {layer.relative_rms_error for layer in report.layers} == {None}  # there are no values to compare
    y = model(torch.zeros(2, 9, dtype=torch.int64))
    assert where(y, *model.parameters(), *model.buffers()) == {"cuda"}
    assert y.shape == (2, 9, VOCABULARY)


@pytest.mark.usefixtures("cuda_torch", "fake_cuda")
def test_a_layer_is_made_loaded_and_made_dense() -> None:
    layer = NF4Linear(65, 33, group_size=32)
    layer.load_state_dict(NF4Linear(65, 33, group_size=32).state_dict(), strict=True)
    layer.load_state_dict(torch.nn.Linear(65, 33).state_dict())
    dense = layer.to_linear()
    assert where(layer.weight, layer.scales, dense.weight) == {"cuda"}


@pytest.mark.usefixtures("cuda_torch", "fake_cuda")
def test_a_model_on_another_device_than_x_is_refused() -> None:
    layer = NF4Linear(64, 6)
    with pytest.raises(RuntimeError, match=r"two (different )?devices,? cpu(,| and) cuda:0"):
        layer(torch.empty(3, 64, device="cpu"))


@pytest.mark.usefixtures("cuda_torch", "fake_cuda")
def test_a_model_is_exported_for_cuda() -> None:
    model = Llama(layers=3)
    quantize_model(model, group_size=32)
    shapes = ({0: Dim("batch"), 1: Dim("tokens")},)
    program = export(model, (torch.zeros(2, 9, dtype=torch.int64),), dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.target is OPS.linear_nf4.default]
    assert len(calls) == 3 * 7
    assert where(*(call.meta["val"] for call in calls)) == {"cuda"}


# --- CUDA graphs: a captured call may not wait for the GPU, read from it, or allocate outside torch's allocator -------

BREAKS_A_CAPTURE = re.compile(
    r"cuda(Malloc|Free|HostAlloc|Memcpy|Memset|DeviceSynchronize|StreamSynchronize|EventSynchronize)|"
    r"\.item[<(]|\.cpu\(|\.to\(at::kCPU|_local_scalar_dense|nonzero|is_nonzero|device_synchronize|static\s+Tensor"
)


@pytest.mark.parametrize(
    "name",
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in [
            *(ROOT / "csrc" / "ops").glob("cuda_*"),
            *(ROOT / "csrc" / "cuda").iterdir(),
            ROOT / "csrc" / "ops" / "weight_tiles.h",
        ]
    ),
)
def test_the_cuda_sources_neither_wait_nor_read_back_nor_allocate_themselves(name: str) -> None:
    assert BREAKS_A_CAPTURE.findall((ROOT / name).read_text()) == []


class Cuda(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("capturing", [False, True])
def test_the_look_for_nan_is_skipped_while_a_stream_is_captured(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    w = torch.full((6, 64), float("nan")).as_subclass(Cuda)
    if capturing:
        assert bool(quantize_nf4(w)[1].isnan().all())
    else:
        with pytest.raises(ValueError, match="quantize_nf4: w holds nan at row 0, column 0"):
            quantize_nf4(w)
