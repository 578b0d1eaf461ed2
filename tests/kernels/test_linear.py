"""linear_nf4 on the CPU against its definition: a float64 product with the weight that packed and scales decode to."""

from __future__ import annotations

import json
from itertools import product
from math import lcm
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import squish_nf4
from squish_nf4 import _C
from tests.support import reference
from tests.support.helpers import ForcedIsa, relative, require
from tests.support.processes import run_python

OPS = torch.ops.squish
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUP_SIZES = [1, 2, 3, 16, 32, 64, 100]
BATCHES = [1, 2, 4, 5, 6, 7, 12, 13, 40, 47, 48, 300]


AMX = "amx_bf16" in Path("/proc/cpuinfo").read_text()


def require_own_kernels(dtype: torch.dtype, m: int) -> None:
    """Where ATen multiplies instead (docs/numerics.md), the bits may depend on the number of threads."""
    aten = dtype == torch.bfloat16 and m >= (32 if AMX else 4096)
    require("own-kernels", not aten, f"ATen multiplies {m} bfloat16 activations on this processor")


def packed_weight(rng: np.random.Generator, n: int, d: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed bytes, scales of both signs, and the (n, d) float32 weight they decode to; columns after d are zero."""
    block = lcm(2, group_size)
    columns = -(-d // block) * block
    packed = rng.integers(0, 256, (n, columns // 2), dtype=np.uint8)
    indices = np.stack([packed & 15, packed >> 4], axis=2).reshape(n, columns)
    indices[:, d:] = 7  # the level 0
    packed = indices[:, 0::2] | indices[:, 1::2] << 4
    scales = rng.standard_normal((n, columns // group_size), dtype=np.float32)
    decoded = reference.dequantize(packed, scales, group_size)[:, :d]
    return torch.from_numpy(packed), torch.from_numpy(scales), torch.from_numpy(decoded)


def exact_linear(x: Tensor, decoded: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), decoded.double(), None if bias is None else bias.double())


def spread(x: Tensor, decoded: Tensor) -> float:
    """The norm of the result with random signs. A single sum that happens to cancel is no measure of its own error."""
    return float((x.double().square() @ decoded.double().square().T).sum().sqrt())


def require_definition(x: Tensor, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, group_size: int) -> None:
    """float32 within 1e-6 of float64; 16 bits no worse than 1.2 times what dense torch makes of the decoded weight."""
    packed, scales, decoded = weight
    y = OPS.linear_nf4(x, packed, scales, bias, group_size)
    assert y.dtype == x.dtype
    exact = exact_linear(x, decoded, bias)
    if x.dtype == torch.float32:
        assert relative(y, exact) <= 1e-6 * max(1.0, spread(x, decoded) / float(exact.norm()))
    else:
        dense = F.linear(x, decoded.to(x.dtype), None if bias is None else bias.to(x.dtype))
        assert relative(y, exact) <= 1.2 * relative(dense, exact)


@pytest.mark.parametrize("m", BATCHES, ids="m={}".format)
@pytest.mark.parametrize("group_size", GROUP_SIZES, ids="g={}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_float64_product_with_the_decoded_weight(
    rng: np.random.Generator, dtype: torch.dtype, group_size: int, m: int
) -> None:
    block = lcm(2, group_size)
    columns = -(-160 // block) * block
    for d in {
        columns,
        columns - 1,
        max(1, columns - block + 1),
    }:  # no padding, one column of it, as much as there may be
        weight = packed_weight(rng, 70, d, group_size)
        x = torch.from_numpy(rng.standard_normal((m, d), dtype=np.float32)).to(dtype)
        for bias_dtype in (None, *DTYPES):
            bias = (
                None
                if bias_dtype is None
                else torch.from_numpy(rng.standard_normal(70, dtype=np.float32)).to(bias_dtype)
            )
            require_definition(x, weight, bias, group_size)


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 1000], ids="n={}".format)
@pytest.mark.parametrize(("d", "group_size"), [(1, 2), (2, 2), (15, 16), (1000, 40), (4099, 64), (4096, 4096)])
def test_every_size_of_weight(rng: np.random.Generator, d: int, group_size: int, n: int, m: int) -> None:
    x = torch.from_numpy(rng.standard_normal((m, d), dtype=np.float32))
    require_definition(x, packed_weight(rng, n, d, group_size), None, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize("group_size", [3, 32])
def test_every_cpu_path_computes_the_definition(
    forced_isa: ForcedIsa, rng: np.random.Generator, group_size: int, m: int, dtype: torch.dtype
) -> None:
    for d in (192, 191):
        packed, scales, decoded = packed_weight(rng, 70, d, group_size)
        x = torch.from_numpy(rng.standard_normal((m, d), dtype=np.float32)).to(dtype)
        bias = torch.from_numpy(rng.standard_normal(70, dtype=np.float32))
        arrays = (x.float().numpy(), packed.numpy(), scales.numpy(), bias.numpy())
        isa, y = forced_isa(linear_in_child, *arrays, group_size, str(dtype))
        assert isa == forced_isa.isa  # else the default would be tested four times
        exact = exact_linear(x, decoded, bias)
        allowed = 1e-6
        if dtype != torch.float32:
            allowed = 1.2 * relative(F.linear(x, decoded.to(dtype), bias.to(dtype)), exact)
        assert relative(torch.from_numpy(y), exact) <= allowed


def linear_in_child(
    x: np.ndarray, packed: np.ndarray, scales: np.ndarray, bias: np.ndarray, group_size: int, dtype: str
) -> tuple[str, np.ndarray]:
    """The CPU path of this process, and y as float32."""
    from squish_nf4 import _C

    x, packed, scales, bias = (torch.from_numpy(array) for array in (x, packed, scales, bias))
    x = x.to(getattr(torch, dtype.removeprefix("torch.")))
    return _C.cpu_isa(), OPS.linear_nf4(x, packed, scales, bias, group_size).float().numpy()


# --- one rounding -----------------------------------------------------------------------------------------------------


def ones_and_zeros(n: int, d: int) -> tuple[Tensor, Tensor]:
    """A weight (n, d) of group size 32 whose first two columns are 1 and the others 0."""
    w = torch.zeros(n, d)
    w[:, :2] = 1
    return OPS.quantize_nf4(w, 32)


def rounding_cases(dtype: torch.dtype, bias_dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """(x1, bias, result): 1 + x1 + bias, rounded once, is the result; rounded twice it is another value."""
    ulp = torch.finfo(dtype).eps
    half, tiny = ulp / 2, torch.finfo(dtype).eps / 16
    cases = [
        (half, ulp / 4, 1 + ulp),  # 1 + half is a tie and would go down to 1 before the bias comes
        (half, tiny, 1 + ulp),
        (half + ulp, -tiny, 1 + ulp),  # 1 + 3/2 ulp is a tie and would go up to 1 + 2 ulp
    ]
    if bias_dtype == torch.float32:
        cases.append((-2.0, 1 + half / 2, half / 2))  # a bias rounded to 16 bits would be 1
    return cases


def rounded_once(m: int, n: int, dtype: str, bias_dtype: str) -> list[tuple[float, float, bool]]:
    """For each case: the product, the bias, and whether every element of the result is the sum rounded once."""
    x_dtype, b_dtype = getattr(torch, dtype), getattr(torch, bias_dtype)
    packed, scales = ones_and_zeros(n, 64)
    found = []
    for second, bias, expected in rounding_cases(x_dtype, b_dtype):
        on_the_way = torch.tensor(1 + second, dtype=torch.float64).to(x_dtype) + torch.tensor(bias).to(x_dtype)
        assert float(on_the_way) != expected  # else the case would prove nothing
        x = torch.zeros(m, 64, dtype=x_dtype)
        x[:, 0], x[:, 1] = 1, second
        assert float(x[0, 1]) == second
        y = OPS.linear_nf4(x, packed, scales, torch.full((n,), bias, dtype=b_dtype), 32)
        found.append((1 + second, bias, bool((y == expected).all())))
    return found


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_bias_is_added_in_float32_before_the_one_rounding(
    forced_isa: ForcedIsa, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    names = [str(d).removeprefix("torch.") for d in (dtype, bias_dtype)]
    for m in (1, 6, 7, 8, 9, 64, 65, 300):
        for n in (5, 70):
            found = forced_isa(rounded_once, m, n, *names)
            assert [case for case in found if not case[2]] == [], (m, n)


# --- the same bits on every run, for every number of threads ---------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 4, 5, 7, 47, 48, 65, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_threads_gives_the_same_bits(rng: np.random.Generator, dtype: torch.dtype, m: int) -> None:
    require_own_kernels(dtype, m)
    before = torch.get_num_threads()
    for n, d, group_size in [(1000, 1000, 8), (301, 512, 64), (3, 8192, 64), (70, 90, 3)]:
        packed, scales, _ = packed_weight(rng, n, d, group_size)
        x = torch.from_numpy(rng.standard_normal((m, d), dtype=np.float32)).to(dtype)
        results = []
        try:
            for threads in (1, 2, 5, 1, 2, 5):
                torch.set_num_threads(threads)
                results.append(OPS.linear_nf4(x, packed, scales, None, group_size))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("m", [2, 5, 48, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_gets_the_bits_that_it_gets_among_others(
    rng: np.random.Generator, dtype: torch.dtype, m: int
) -> None:
    """Of as many: up to four activations, and from five on, the order of summation is the same."""
    require_own_kernels(dtype, m + 40)
    packed, scales, _ = packed_weight(rng, 70, 4800, 64)
    x = torch.from_numpy(rng.standard_normal((m + 40, 4800), dtype=np.float32)).to(dtype)
    few = OPS.linear_nf4(x[:m], packed, scales, None, 64)
    assert torch.equal(few, OPS.linear_nf4(x[:m].flip(0), packed, scales, None, 64).flip(0))
    if m >= 5:
        assert torch.equal(few, OPS.linear_nf4(x, packed, scales, None, 64)[:m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_activations_than_are_packed_at_once(rng: np.random.Generator, dtype: torch.dtype) -> None:
    """8 MiB hold 16 float32 or 32 bfloat16 activations of 131,072 columns."""
    require_own_kernels(dtype, 40)
    weight = packed_weight(rng, 5, 131072, 64)
    x = torch.from_numpy(rng.standard_normal((40, 131072), dtype=np.float32)).to(dtype)
    require_definition(x, weight, None, 64)
    y = OPS.linear_nf4(x, *weight[:2], None, 64)
    for m in (13, 37):
        assert torch.equal(OPS.linear_nf4(x[:m], *weight[:2], None, 64), y[:m])


def test_no_stretch_of_activations_is_so_short_that_it_would_be_summed_in_another_order() -> None:
    """241 = 16 * 15 + 1: in stretches of 16, the last one would be a single activation."""
    rng = np.random.default_rng(8)
    packed, scales, _ = packed_weight(rng, 4, 131072, 64)
    x = torch.from_numpy(rng.standard_normal((242, 131072), dtype=np.float32))
    for m in (241, 242):
        assert torch.equal(
            OPS.linear_nf4(x[:m], packed, scales, None, 64)[-20:],
            OPS.linear_nf4(x[m - 20 : m], packed, scales, None, 64),
        )


def check_large_groups(isa: str) -> None:
    """A step across the border of two groups that are too long to be counted in float32."""
    assert _C.cpu_isa() == isa
    for group_size in (16810143, 16808303):
        packed = torch.full((4, group_size), 0xFF, dtype=torch.uint8)  # every level is 1
        scales = torch.tensor([[1.0, 2.0]]).expand(4, 2)
        x = torch.zeros(1, 2 * group_size)
        x[0, group_size - 100 : group_size + 100] = 1.0
        assert OPS.linear_nf4(x, packed, scales, None, group_size).tolist() == [[300.0] * 4]


def test_groups_of_millions_of_columns(forced_isa: ForcedIsa) -> None:
    forced_isa(check_large_groups, forced_isa.isa)


def check_awkward_16_bit_activations(isa: str, dtype: torch.dtype, m: int) -> None:
    """Outliers where the weight is zero, heavy tails, and factors whose product is out of float32's range."""
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(7)
    packed, scales, decoded = packed_weight(rng, 70, 1024, 64)
    x = torch.from_numpy(rng.standard_normal((m, 1024), dtype=np.float32))
    heavy = x * torch.exp(2 * torch.from_numpy(rng.standard_normal((m, 1024), dtype=np.float32)))
    require_definition(heavy.to(dtype), (packed, scales, decoded), None, 64)

    outliers, zeroed = x.clone(), packed.clone()
    outliers[:, ::64] = 300.0
    zeroed[:, ::32] = (zeroed[:, ::32] & 0xF0) | 7
    without = decoded.clone()
    without[:, ::64] = 0.0
    require_definition(outliers.to(dtype), (zeroed, scales, without), None, 64)

    if dtype == torch.bfloat16:
        tiny = 2.0**-100
        for size in (1.0, 2.0**-8):
            require_definition((x * size).to(dtype), (packed, scales * tiny, decoded * tiny), None, 64)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_awkward_16_bit_activations(forced_isa: ForcedIsa, dtype: torch.dtype, m: int) -> None:
    forced_isa(check_awkward_16_bit_activations, forced_isa.isa, dtype, m)


@pytest.mark.parametrize("with_bias", [False, True])
def test_where_aten_multiplies_the_definition_and_every_run_agree(rng: np.random.Generator, with_bias: bool) -> None:
    """From 4096 bfloat16 activations on (docs/numerics.md); a bias of another dtype is not ATen's."""
    weight = packed_weight(rng, 500, 320, 64)
    x = torch.from_numpy(rng.standard_normal((4096, 320), dtype=np.float32)).bfloat16()
    for dtype in (torch.bfloat16, torch.float32) if with_bias else (torch.bfloat16,):
        bias = torch.from_numpy(rng.standard_normal(500, dtype=np.float32)).to(dtype) if with_bias else None
        require_definition(x, weight, bias, 64)
        first = OPS.linear_nf4(x, *weight[:2], bias, 64)
        assert all(torch.equal(OPS.linear_nf4(x.clone(), *weight[:2], bias, 64), first) for _ in range(3))


# --- shapes and strides of x ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (2, 3, 4), (1, 1, 1, 50)], ids=str)
def test_leading_dimensions_are_kept(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed, scales, _ = packed_weight(rng, 70, 61, 32)
    x = torch.from_numpy(rng.standard_normal((*shape, 61), dtype=np.float32)).to(dtype)
    bias = torch.from_numpy(rng.standard_normal(70, dtype=np.float32))
    y = OPS.linear_nf4(x, packed, scales, bias)
    assert y.shape == (*shape, 70)
    assert y.is_contiguous()
    assert torch.equal(y.reshape(-1, 70), OPS.linear_nf4(x.reshape(-1, 61), packed, scales, bias))


@pytest.mark.parametrize("m", [4, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 61])
def test_a_strided_x_gives_the_bits_of_a_contiguous_one(
    rng: np.random.Generator, d: int, dtype: torch.dtype, m: int
) -> None:
    packed, scales, _ = packed_weight(rng, 70, d, 32)
    large = torch.from_numpy(rng.standard_normal((2 * m, 2 * d + 1), dtype=np.float32)).to(dtype)
    strided = {
        "rows apart": large[:m, :d],
        "offset": large[1 : m + 1, 3 : d + 3],
        "columns apart": large[:m, : 2 * d : 2],
        "every second row": large[::2, :d],
        "transposed": large[:m, :d].t().contiguous().t(),
        "expanded": large[:1, :d].expand(m, d),
        "three dimensions": large[:m, :d].reshape(2, m // 2, d).transpose(0, 1),
    }
    for name, x in strided.items():
        found = OPS.linear_nf4(x, packed, scales)
        assert torch.equal(found, OPS.linear_nf4(x.contiguous().clone(), packed, scales)), name


@pytest.mark.parametrize("m", [4, 40])
def test_strided_packed_scales_and_bias_give_the_same_bits(rng: np.random.Generator, m: int) -> None:
    packed, scales, _ = packed_weight(rng, 70, 64, 32)
    x = torch.from_numpy(rng.standard_normal((m, 64), dtype=np.float32))
    bias = torch.from_numpy(rng.standard_normal(140, dtype=np.float32))
    expected = OPS.linear_nf4(x, packed, scales, bias[::2].contiguous())
    for p in (packed, packed.t().contiguous().t()):
        for s in (scales, scales.t().contiguous().t(), scales.repeat(1, 2)[:, :2]):
            assert torch.equal(OPS.linear_nf4(x, p, s, bias[::2]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 40])
def test_empty_sizes(dtype: torch.dtype, m: int) -> None:
    packed, scales = OPS.quantize_nf4(torch.ones(6, 64))
    bias = torch.arange(6.0)
    assert OPS.linear_nf4(torch.ones(0, 64, dtype=dtype), packed, scales, bias).shape == (0, 6)
    assert OPS.linear_nf4(torch.ones(3, 0, 64, dtype=dtype), packed, scales, bias).shape == (3, 0, 6)
    no_rows = OPS.quantize_nf4(torch.ones(0, 64))
    assert OPS.linear_nf4(torch.ones(m, 64, dtype=dtype), *no_rows, torch.ones(0)).shape == (m, 0)
    no_columns = OPS.quantize_nf4(torch.ones(6, 0))
    y = OPS.linear_nf4(torch.ones(m, 0, dtype=dtype), *no_columns, bias)
    assert torch.equal(y, bias.to(dtype).expand(m, 6))
    y = OPS.linear_nf4(torch.ones(m, 0, dtype=dtype), *no_columns)
    assert torch.equal(y, torch.zeros(m, 6, dtype=dtype))


@pytest.mark.parametrize("d", [61, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40])
def test_non_finite_activations_reach_their_own_row_only(
    forced_isa: ForcedIsa, m: int, dtype: torch.dtype, d: int
) -> None:
    forced_isa(check_non_finite_activations, forced_isa.isa, m, dtype, d)


def check_non_finite_activations(isa: str, m: int, dtype: torch.dtype, d: int) -> None:
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(9)
    packed, scales, decoded = packed_weight(rng, 70, d, 32)
    x = torch.from_numpy(rng.standard_normal((m + 1, d), dtype=np.float32)).to(dtype)
    clean = OPS.linear_nf4(x, packed, scales)
    x[m, d - 1] = float("nan")
    y = OPS.linear_nf4(x, packed, scales)
    assert bool(y[m].isnan().all())
    if isa == "avx2" and dtype != torch.float32 and m < 4:  # no longer in integers: the same but for rounding
        require_definition(x[:m], (packed, scales, decoded), None, 32)
        assert relative(y[:m], clean[:m].double()) < (1e-3 if dtype == torch.float16 else 5e-3)
    else:
        assert torch.equal(y[:m], clean[:m])


def test_one_activation_near_the_end_of_the_range_is_multiplied_exactly(forced_isa: ForcedIsa) -> None:
    """AVX2 multiplies few activations as integers, in units of the largest: that one would be all that is left."""
    forced_isa(check_large_activations, forced_isa.isa)


def check_large_activations(isa: str) -> None:
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(10)
    packed, scales, decoded = packed_weight(rng, 70, 128, 64)
    packed[:, 2] = (packed[:, 2] & 0x0F) | 0x70  # column 5 has the level 0: the others show
    scales, decoded = scales * 2.0**-60, decoded * 2.0**-60
    decoded[:, 5] = 0
    for largest in (1e38, 3e38):
        for others in (largest / 2**16, largest / 64):
            x = torch.from_numpy(rng.standard_normal((2, 128), dtype=np.float32) * np.float32(others)).bfloat16()
            x[1, 5] = largest
            y = OPS.linear_nf4(x, packed, scales, None, 64)
            exact = exact_linear(x, decoded, None)
            for row in range(2):
                assert relative(y[row], exact[row]) < 5e-3, (largest, others, row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_subnormal_activations_count_where_the_process_flushes_them(forced_isa: ForcedIsa, dtype: torch.dtype) -> None:
    forced_isa(check_subnormal_activations, forced_isa.isa, dtype)


def check_subnormal_activations(isa: str, dtype: torch.dtype) -> None:
    assert _C.cpu_isa() == isa
    packed = torch.full((8, 32), 0xFF, dtype=torch.uint8)  # every level is 1
    scales = torch.full((8, 1), 2.0**100)
    x = torch.full((1, 64), 2.0**-130).to(dtype)  # exact in bfloat16
    expected = OPS.linear_nf4(x, packed, scales, None, 64)
    assert torch.set_flush_denormal(True)
    try:
        y = OPS.linear_nf4(x, packed, scales, None, 64)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected)
    if isa != "avx512_bf16" or dtype == torch.float32:  # whose instruction takes them as zero
        assert torch.equal(y, torch.full((1, 8), 2.0**-24).to(dtype))


# --- bounded scratch --------------------------------------------------------------------------------------------------

# Each case in a child of its own, for a process has one peak.
PEAK_MEMORY = """
import json, os, re, sys, torch
torch.ops.load_library(sys.argv[1])

def peak():
    status = open("/proc/self/status").read()  # getrusage's peak would begin with that of whoever started this process
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

def run(n, dtype, m, direction):
    packed = torch.randint(0, 256, (n, 2048), dtype=torch.uint8)
    scales = torch.rand(n, 64)
    x = torch.ones(m, 4096, dtype=getattr(torch, dtype), requires_grad=True)
    before = peak()
    y = torch.ops.squish.linear_nf4(x, packed, scales, torch.ones(n), 64)
    if direction == "backward":
        y.sum().backward()
    return peak() - before, y.nbytes * (2 if direction == "backward" else 1) + x.nbytes

for case in json.loads(sys.argv[2]):
    if os.fork() == 0:
        torch.set_num_threads(2)
        run(512, *case)  # what ATen sets up once
        more, results = run(16384, *case)
        print(*case, more - results / 2**20, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.sweeps
def test_no_call_holds_a_dense_weight() -> None:
    """It would be 256 MiB in float32 and 128 MiB in bfloat16; a call takes less than 64 MiB beside its results."""
    require("linux", Path("/proc/self/status").exists(), "peaks are read from /proc")
    cases = list(product(["float32", "bfloat16"], [16, 40], ["forward", "backward"]))
    cases.append(("bfloat16", 4100, "forward"))  # by ATen
    lines = run_python(PEAK_MEMORY, squish_nf4.library_path(), json.dumps(cases)).splitlines()
    scratch = {case: float(mebibytes) for case, mebibytes in (line.rsplit(" ", 1) for line in lines)}
    assert list(scratch) == [" ".join(map(str, case)) for case in cases]
    assert {case: mebibytes for case, mebibytes in scratch.items() if mebibytes >= 64} == {}
