"""The tests of the executed kernels find what they are there to find: each mutant of the kernels fails one of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support import cuda_inputs as inputs
from tests.support.cuda_inputs import assert_same_bits
from tests.support.gpus import ExecutedGpu, end_of, end_of_output
from tests.support.products import assert_product
from tests.support.ptx.host import compile_mutant
from tests.support.ptx.memory import KernelError

OPS = torch.ops.squish
Check = Callable[[ExecutedGpu], None]
pytestmark = pytest.mark.builds


def quantize(d: int, group_size: int, dtype: torch.dtype = torch.float32) -> Check:
    def check(gpu: ExecutedGpu) -> None:
        w = inputs.normal(3, d).to(dtype)
        for found, expected in zip(gpu.quantize_nf4(w, group_size), OPS.quantize_nf4(w, group_size), strict=True):
            assert_same_bits(found, expected, "")

    return check


def boundaries(exponents: range) -> Check:
    def check(gpu: ExecutedGpu) -> None:
        for w, group_size in inputs.around_the_boundaries(exponents):
            assert_same_bits(gpu.quantize_nf4(w, group_size)[0], OPS.quantize_nf4(w, group_size)[0], "")

    return check


def dequantize(d: int, group_size: int, dtype: torch.dtype) -> Check:
    def check(gpu: ExecutedGpu) -> None:
        packed, scales = inputs.packed_weight(3, d, group_size)
        scales[1, 0] = float("nan")
        expected = OPS.dequantize_nf4(packed, scales, group_size, dtype=dtype)
        assert_same_bits(gpu.dequantize_nf4(packed, scales, group_size, dtype), expected, "")

    return check


def linear(d: int, group_size: int, m: int = 3, width: int = 0, dtype: torch.dtype = torch.bfloat16) -> Check:
    """Of float32: without tensor cores."""

    def check(gpu: ExecutedGpu) -> None:
        packed, scales = inputs.packed_weight(40, d, group_size)
        x, bias = inputs.normal(m, width or d, seed=9).to(dtype), inputs.normal(40, seed=10).to(dtype)
        weight = OPS.dequantize_nf4(packed, scales, group_size)[:, : width or d]
        assert_product(gpu.linear_nf4(x, packed, scales, bias, group_size), x, weight.t(), bias, "")

    return check


def survey(gpu: ExecutedGpu) -> None:
    w = inputs.normal(9, 600).float()
    packed, scales = OPS.quantize_nf4(w, 50)
    assert_same_bits(gpu.survey_nf4(w, packed, scales, 50), OPS._survey_nf4(w, packed, scales, 50), "")


def quantize_beyond_32_bits(gpu: ExecutedGpu) -> None:
    """The last 4096 of 2^31 + 4096 weights."""
    d, group_size, tail = 2**31 + 4096, 64, 4096
    w = inputs.normal(1, tail).float()
    memory = gpu.gpu.reset()
    given = end_of(memory, w, d)
    packed = end_of_output(memory, 1, d // 2, tail // 2)
    scales = end_of_output(memory, 4, d // group_size, tail // group_size)
    gpu.gpu.only = lambda blocks: range(blocks - 2, blocks)
    try:
        gpu.gpu.call("quantize_float32", given, 1, d, d, group_size, packed, scales)
    finally:
        gpu.gpu.only = None
    assert packed.bytes().tobytes() == OPS.quantize_nf4(w, group_size)[0].numpy().tobytes()


# The types that the checks above take; a mutant is compiled for no others, for that is most of its time.
TYPES = {
    "quantize": ("float",),
    "dequantize": ("float", "nf4::BFloat16"),
    "survey": ("float",),
    "linear_small_m": ("nf4::BFloat16",),
    "linear_plain": ("float",),
}


def for_types(source: str, types: tuple[str, ...]) -> str:
    """The source of a kernel without what it is instantiated for beside these types."""
    instances = re.findall(r"^(?:SQUISH_INSTANTIATE_\w+\(|template .*FewActivations<)([\w:]+)\b.*;\n", source, re.M)
    assert set(types) <= set(instances)
    for other in set(instances) - set(types):
        source = re.sub(
            rf"^(SQUISH_INSTANTIATE_\w+\(|template .*FewActivations<){other}\b.*;\n", "", source, flags=re.M
        )
    return source


@dataclass(frozen=True)
class Mutant:
    file: str
    was: str
    becomes: str
    check: Check


MUTANTS = {
    "a shuffle over half of its lanes": Mutant(
        "quantize",
        "for (int offset = kLanes / 2; offset > 0; offset /= 2)\n        absmax = max",
        "for (int offset = kLanes / 4; offset > 0; offset /= 2)\n        absmax = max",
        quantize(512, 64),
    ),
    "levels from lanes of the wrong width": Mutant(
        "dequantize",
        "4 * k), nf4::kLevelCount)",
        "4 * k), nf4::kLevelCount / 2)",
        dequantize(256, 64, torch.float32),
    ),
    "a tail of one octet too many": Mutant(
        "quantize",
        "if (s * kThreads >= left) continue;",
        "if (s * kThreads > left) continue;",
        quantize(320, 64),
    ),
    "the product with the reciprocal for float32": Mutant(
        "quantize",
        "std::is_same_v<T, float> ? quotient(w, scale, reciprocal) : w * reciprocal",
        "w * reciprocal",
        boundaries(range(2)),
    ),
    "halves of a byte exchanged": Mutant(
        "quantize",
        "pack_indices(even, odd)",
        "pack_indices(odd, even)",
        quantize(96, 3),
    ),
    "an index of 32 bits": Mutant(
        "quantize",
        "row * row_stride + first * kColumns",
        "row * row_stride + static_cast<int>(first * kColumns)",
        quantize_beyond_32_bits,
    ),
    "the quick quotient under any scale": Mutant(
        "quantize",
        "return nf4::bits_of(scale) - kLeast < kAbove - kLeast;",
        "return true;",
        boundaries(range(-126, -122)),
    ),
    "more than one NaN": Mutant(
        "dequantize",
        "return product == product ? rounded",
        "return true ? rounded",
        dequantize(256, 64, torch.bfloat16),
    ),
    "the scale of the neighbour group": Mutant(
        "dequantize",
        "scales[(2 * j + 1) / group_size]",
        "scales[2 * j / group_size]",
        dequantize(60, 3, torch.float32),
    ),
    "no barrier between the table and who reads it": Mutant(
        "linear_small_m",
        "wait_for_copies();\n  __syncthreads();",
        "wait_for_copies();",
        linear(256, 64),
    ),
    "a barrier before the copies are there": Mutant(
        "linear_small_m",
        "wait_for_copies();\n  __syncthreads();",
        "__syncthreads();\n  wait_for_copies();",
        linear(256, 64),
    ),
    "sums that begin with what was there": Mutant(
        "linear_plain",
        "float sum[kRows][kM] = {};",
        "float sum[kRows][kM];",
        linear(64, 8, dtype=torch.float32),
    ),
    "no wait for the copies of the scales": Mutant(
        "linear_small_m",
        "  wait_for_copies();\n",
        "",
        linear(256, 64),
    ),
    "no barrier between the table and the sums in its place": Mutant(
        "linear_small_m",
        "  __syncthreads();  // the table is done with\n",
        "",
        linear(2048, 64),
    ),
    "a load ahead that nothing stops": Mutant(
        "linear_small_m",
        "if (chunk + 1 < last) load(next);",
        "load(next);",
        linear(256, 64),
    ),
    "the wrong row of a fragment": Mutant(
        "linear_small_m",
        "from + (2 * r + 1) * eight_rows",
        "from + (2 * r) * eight_rows",
        linear(256, 64),
    ),
    "the bias twice": Mutant(
        "linear_small_m",
        "total += nf4::to_float(bias[row]);",
        "total += 2 * nf4::to_float(bias[row]);",
        linear(256, 64),
    ),
    "no barrier between two stretches of x": Mutant(
        "linear_plain",
        "__syncthreads();  // the stretch before is done with",
        "",
        linear(1024, 64, dtype=torch.float32),
    ),
    "a stretch that is read before it is there": Mutant(
        "linear_plain",
        "    __syncthreads();\n    const int columns",
        "    const int columns",
        linear(512, 64, dtype=torch.float32),
    ),
    "scales of the first half of a byte for both": Mutant(
        "linear_plain",
        "scales[scales_at[r] + (column + 1) / group_size]",
        "scales[scales_at[r] + column / group_size]",
        linear(60, 3, dtype=torch.float32),
    ),
    "a row past the last one": Mutant(
        "linear_plain",
        "a < activations && row <= last_row",
        "a < activations && row <= last_row + 1",
        linear(64, 8, dtype=torch.float32),
    ),
    "the first activations for all blocks": Mutant(
        "linear_plain",
        "call.x + first_activation * call.x_stride",
        "call.x",
        linear(64, 8, m=12, dtype=torch.float32),
    ),
    "sums that are added in another order": Mutant(
        "survey",
        "own, lane, kLanes)",
        "own, kLanes - 1 - lane, kLanes)",
        survey,
    ),
    "rows past the end that are read": Mutant(
        "survey",
        "row = min(wanted, n - 1)",
        "row = wanted",
        survey,
    ),
    "a column past the end of x": Mutant(
        "linear_small_m",
        "if (column + k < x_columns)",
        "if (column + k <= x_columns)",
        linear(256, 64, width=250),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_kernels_as_they_are_pass(executed: ExecutedGpu, name: str) -> None:
    MUTANTS[name].check(executed)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(executed: ExecutedGpu, name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    source = (ROOT / "csrc" / "cuda" / f"{mutant.file}.cu").read_text()
    assert source.count(mutant.was) == 1, "the mutant has to be written anew: the kernel has changed"
    path = tmp_path / f"{mutant.file}.cu"
    path.write_text(for_types(source.replace(mutant.was, mutant.becomes), TYPES[mutant.file]))
    library = compile_mutant(str(shutil.which("nvcc")), path, tmp_path, executed.library)
    gpu = ExecutedGpu(library)
    for kernel in gpu.gpu.entries():
        if f"_{mutant.file}_cu_" in kernel:
            gpu.gpu.kernel(kernel)  # what is not understood is no fault that was found
    with pytest.raises((KernelError, AssertionError)):
        mutant.check(gpu)
