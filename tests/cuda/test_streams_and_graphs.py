"""The operators on a GPU: other streams, CUDA graphs, torch.compile, other devices' guards, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squish_nf4 import NF4Linear, quantize_nf4
from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.helpers import require

OPS = torch.ops.squish
MILLISECONDS = 50


def calls(w: Tensor, x: Tensor) -> list[Tensor]:
    packed, scales = OPS.quantize_nf4(w, 64)
    out = torch.empty_like(w)
    OPS.dequantize_nf4.out(packed, scales, 64, out=out)
    y = OPS.linear_nf4(x, packed, scales, None, 64)
    return [
        packed,
        scales,
        OPS.dequantize_nf4(packed, scales, 64),
        out,
        y,
        OPS._linear_nf4_grad_x(y, packed, scales, 64, 512),
    ]


@pytest.mark.parametrize("m", [1, 16, 300])
def test_another_stream(m: int) -> None:
    """The stream waits first: work on any other one would start too early, and read zeros."""
    w, x = inputs.normal(256, 512).to(torch.bfloat16).cuda(), inputs.normal(m, 512).to(torch.bfloat16).cuda()
    expected = calls(w, x)
    late_w, late_x = torch.zeros_like(w), torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(MILLISECONDS * 1_000_000)
        late_w.copy_(w)
        late_x.copy_(x)
        found = calls(late_w, late_x)
    stream.synchronize()
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(one, other, i)


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 300])
def test_capture_in_a_graph_and_replay_with_other_values(m: int, dtype: torch.dtype) -> None:
    w, x = inputs.normal(256, 512).to(dtype).cuda(), inputs.normal(m, 512).to(dtype).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls(w, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls(w, x)
    for seed in (1, 2):
        w.copy_(inputs.normal(256, 512, seed=seed))
        x.copy_(inputs.normal(m, 512, seed=seed + 10))
        graph.replay()
        torch.cuda.synchronize()
        for i, (one, other) in enumerate(zip(captured, calls(w, x), strict=True)):
            assert_same_bits(one, other, i)


def test_a_layer_under_torch_compile_with_cuda_graphs() -> None:
    layer = NF4Linear.from_linear(torch.nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16))
    compiled = torch.compile(lambda x: torch.nn.functional.gelu(layer(x)), mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            x = inputs.normal(3, 512, seed=seed).to(torch.bfloat16).cuda()
            expected = torch.nn.functional.gelu(layer(x)).double()
            assert float((compiled(x).double() - expected).norm() / expected.norm()) < 0.01


def test_more_than_2_to_the_31_elements() -> None:
    """Rows far behind the ends of 31 and 32 bits are those that the CPU makes of the same values."""
    n, d = 2**17 + 5, 32768 + 64  # 4.3e9 weights
    free = torch.cuda.mem_get_info()[0]
    require("large-gpu", free > 13 * 10**9, f"{free / 1e9:.1f} GB of GPU memory are free, 13 are wanted")
    w = torch.empty(n, d, dtype=torch.bfloat16, device="cuda")
    for first in range(0, n, 8192):
        w[first : first + 8192].normal_(generator=torch.Generator("cuda").manual_seed(first))
    packed, scales = OPS.quantize_nf4(w, 64)
    rows = [0, 1, 65533, 65535, 65536, 65537, 98304, 131071, 131072, n - 1]
    expected_packed, expected_scales = OPS.quantize_nf4(w[rows].cpu(), 64)
    assert_same_bits(packed[rows], expected_packed, "packed")
    assert_same_bits(scales[rows], expected_scales, "scales")
    OPS.dequantize_nf4.out(packed, scales, 64, out=w)
    expected = OPS.dequantize_nf4(expected_packed, expected_scales, 64, dtype=torch.bfloat16)
    assert_same_bits(w[rows], expected, "decoded")
    x = inputs.normal(2, d).to(torch.bfloat16).cuda()
    y = OPS.linear_nf4(x, packed, scales, None, 64)[:, rows].double()
    exact = x.double() @ w[rows].double().t()
    assert float((y - exact).norm() / exact.norm()) < 0.005


def test_nothing_waits_for_the_gpu() -> None:
    w, x = inputs.normal(256, 512).to(torch.bfloat16).cuda(), inputs.normal(4, 512).to(torch.bfloat16).cuda()
    calls(w, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls(w, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nan_is_refused_by_the_function_and_marked_by_the_operator() -> None:
    w = inputs.normal(6, 64).float().cuda()
    w[2, 40] = float("nan")
    with pytest.raises(ValueError, match="quantize_nf4: w holds nan at row 2, column 40"):
        quantize_nf4(w, 32)
    _, scales = OPS.quantize_nf4(w, 32)
    assert scales.isnan().nonzero().tolist() == [[2, 1]]
