"""What the kernels are made of, and what the fast ones ask of memory: whole sectors, no bank of shared memory twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import cuda_inputs as inputs
from tests.support.gpus import ExecutedGpu
from tests.support.ptx.machine import Costs
from tests.support.ptx.operations import MEANINGS

pytestmark = pytest.mark.builds


def test_every_meaning_is_one_that_a_kernel_needs(executed: ExecutedGpu) -> None:
    """So that the executor stays small, and nobody trusts what nothing has tried."""
    names = executed.gpu.instructions()
    unused = [pattern.pattern for pattern, _ in MEANINGS if not any(pattern.fullmatch(name) for name in names)]
    assert unused == []


def test_every_kernel_is_made_of_instructions_that_are_known(executed: ExecutedGpu) -> None:
    """So none flushes subnormals, divides approximately or adds by atomics, whether a test runs it or not."""
    names = executed.gpu.entries()
    assert len(names) > 50
    for name in names:
        executed.gpu.kernel(name)


@pytest.fixture
def costs(executed: ExecutedGpu) -> Iterator[Costs]:
    executed.gpu.costs = Costs()
    yield executed.gpu.costs
    executed.gpu.costs = None


@pytest.mark.parametrize("dtype", inputs.WEIGHT_DTYPES[:3], ids=str)
@pytest.mark.parametrize("group_size", [8, 64, 256])
def test_quantize(executed: ExecutedGpu, costs: Costs, group_size: int, dtype: torch.dtype) -> None:
    executed.quantize_nf4(inputs.normal(16, 2048).to(dtype), group_size)
    assert all("quantize_octets" in name for name in executed.gpu.launched)
    # A lane's eight float32 are two loads, which share their sectors: the second one finds them in the cache.
    assert costs.sector_efficiency("ld.global.nc.v4") == (0.5 if dtype == torch.float32 else 1)
    assert costs.sector_efficiency("st.global.u32") == 1  # the packed bytes


@pytest.mark.parametrize("dtype", inputs.DENSE_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [8, 64, 256])
def test_dequantize(executed: ExecutedGpu, costs: Costs, group_size: int, dtype: torch.dtype) -> None:
    executed.dequantize_nf4(*inputs.packed_weight(16, 2048, group_size), group_size, dtype)
    assert all("dequantize_vectors" in name for name in executed.gpu.launched)
    assert costs.sector_efficiency("st") >= 0.9
    assert costs.sector_efficiency("ld.global.cs") >= 0.9  # the packed bytes; of the scales, many lanes read one


@pytest.mark.parametrize("m", [1, 4, 8, 16, 32])
def test_linear(executed: ExecutedGpu, costs: Costs, m: int) -> None:
    executed.linear_nf4(inputs.normal(m, 2048).bfloat16(), *inputs.packed_weight(64, 2048, 64), None, 64)
    assert costs.sector_efficiency("ld.global.cs") >= 0.9  # the packed bytes
    assert costs.turns("ld.shared.u32") == 1  # the table
    assert costs.turns("ld.shared.v2") == 1  # the scales


@pytest.mark.parametrize("m", [1, 8])
def test_linear_without_tensor_cores(executed: ExecutedGpu, costs: Costs, m: int) -> None:
    executed.linear_nf4(inputs.normal(m, 2048).float(), *inputs.packed_weight(64, 2048, 64), None, 64)
    assert costs.sector_efficiency("ld.global.cs") == 1  # the packed bytes
    assert costs.turns("ld.shared") == 1  # the table, and x
