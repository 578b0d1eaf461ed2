"""Sizes beyond 2^31: the last blocks of a launch, executed on memory of which only the end is there.

quantize_nf4 is in test_mutants.py, with one that counts in 32 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import bits
from tests.support.gpus import ExecutedGpu, end_of, end_of_output, name_of, tensor_of
from tests.support.products import assert_product
from tests.support.ptx.memory import Memory

OPS = torch.ops.squish
ROWS, COLUMNS, GROUP_SIZE = 2**21, 4096, 64  # of a weight: 2^33 columns, 2^32 packed bytes
LAST = 32  # rows that are there

pytestmark = pytest.mark.builds


@pytest.fixture
def memory(executed: ExecutedGpu) -> Iterator[Memory]:
    """Of a GPU that runs the last blocks of a launch alone."""
    executed.gpu.only = lambda blocks: range(max(0, blocks - 1), blocks)
    yield executed.gpu.reset()
    executed.gpu.only = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize(executed: ExecutedGpu, memory: Memory, dtype: torch.dtype) -> None:
    packed, scales = inputs.packed_weight(1, 4096, GROUP_SIZE)
    count = 2**36 + 4096  # so that the vectors are more than 2^31, too
    given = end_of(memory, packed, count // 2), end_of(memory, scales, count // GROUP_SIZE)
    blocks = 2 if dtype == torch.bfloat16 else 4
    executed.gpu.only = lambda all_blocks: range(all_blocks - blocks, all_blocks)
    out = end_of_output(memory, dtype.itemsize, count, 4096)
    executed.gpu.call(f"dequantize_{name_of(dtype)}", *given, count, GROUP_SIZE, out)
    expected = OPS.dequantize_nf4(packed, scales, GROUP_SIZE, dtype=dtype)
    assert torch.equal(tensor_of(out, dtype, 1, 4096), expected)


def test_survey(executed: ExecutedGpu, memory: Memory) -> None:
    w = inputs.normal(8, COLUMNS).float()
    packed, scales = OPS.quantize_nf4(w, GROUP_SIZE)
    out = end_of_output(memory, 8, 4 * ROWS, 32)
    elements = ROWS * COLUMNS
    given = end_of(memory, packed, elements // 2), end_of(memory, scales, elements // GROUP_SIZE)
    executed.gpu.call(
        "survey_float32",
        *(end_of(memory, w, elements), ROWS, COLUMNS, COLUMNS, *given, COLUMNS // 2, GROUP_SIZE, out),
    )
    assert torch.equal(tensor_of(out, torch.float64, 8, 4), OPS._survey_nf4(w, packed, scales, GROUP_SIZE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear(executed: ExecutedGpu, memory: Memory, dtype: torch.dtype) -> None:
    packed, scales = inputs.packed_weight(LAST, COLUMNS, GROUP_SIZE)
    x = inputs.normal(1, COLUMNS, seed=9).to(dtype)
    elements = ROWS * COLUMNS
    given = end_of(memory, packed, elements // 2), end_of(memory, scales, elements // GROUP_SIZE)
    y = end_of_output(memory, dtype.itemsize, ROWS, LAST)
    executed.gpu.call(
        f"linear_{name_of(dtype)}",
        *(memory.upload(bits(x).numpy()), *given, None, None, y, None),
        *(1, ROWS, COLUMNS, COLUMNS, COLUMNS, GROUP_SIZE),
    )
    assert ("multiply_plain" in executed.gpu.launched[-1]) == (dtype == torch.float32)
    weight = OPS.dequantize_nf4(packed, scales, GROUP_SIZE)
    assert_product(tensor_of(y, dtype, 1, LAST), x, weight.t(), None, str(dtype))


def test_scales_beyond_shared_memory_are_not_taken(executed: ExecutedGpu) -> None:
    """20 activations are too many without tensor cores, whose kernel holds the scales of 32 rows."""
    for d, taken in ((16384, True), (131_072, False)):
        sizes = 20, 64, d, d, d, GROUP_SIZE
        assert executed.gpu.ask("linear_bfloat16_takes", *[None] * 7, *sizes) == taken
