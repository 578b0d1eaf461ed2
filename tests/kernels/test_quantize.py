"""quantize_nf4 gives the bytes of the definition: every CPU path, dtype, group size, shape, layout and awkward value.

Functions named ``check_...`` run in a child process in which one CPU path is forced.
"""

from __future__ import annotations

import math

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import squish_nf4
from squish_nf4 import _C
from tests.support import reference
from tests.support.cases import EXAMPLES, shapes, ulps_from
from tests.support.helpers import ForcedIsa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FLT_MAX = float(np.finfo(np.float32).max)


def in_float32(w: Tensor) -> np.ndarray:
    """What the definition starts from: the weights, rounded to float32 where they are float64."""
    if w.dtype == torch.float64:
        with np.errstate(over="ignore"):
            return w.numpy().astype(np.float32)
    return w.float().contiguous().numpy()


def assert_bytes_equal_the_definition(w: Tensor, group_size: int, isa: str) -> None:
    assert _C.cpu_isa() == isa, f"{_C.cpu_isa()} runs, not {isa}"
    before = w.view(INTEGERS[w.element_size()]).clone()
    expected_packed, expected_scales = reference.quantize(np.ascontiguousarray(in_float32(w)), group_size)
    packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
    what = f"{w.dtype}, shape {tuple(w.shape)}, strides {w.stride()}, group_size {group_size}"
    np.testing.assert_array_equal(packed.numpy(), expected_packed, err_msg=what, strict=True)
    bits = scales.numpy().view(np.uint32)  # bits: the NaN that marks a group is always the same one
    np.testing.assert_array_equal(bits, expected_scales.view(np.uint32), err_msg=what, strict=True)
    assert torch.equal(before, w.view(INTEGERS[w.element_size()])), f"w was written to: {what}"


def check_shapes(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for n, d, group_size in shapes():
        w = torch.from_numpy(rng.standard_normal((n, d))).to(DTYPES[dtype])
        assert_bytes_equal_the_definition(w, group_size, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_equal_the_definition(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_shapes, forced_isa.isa, dtype)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """(n, 192) tensors that are not simply contiguous."""
    values = torch.from_numpy(np.random.default_rng(2).standard_normal(40 * 400)).to(dtype)
    matrix = values.view(40, 400)
    misaligned = bytearray(1 + 5 * 192 * values.element_size())
    misaligned[1:] = values[: 5 * 192].view(torch.uint8).numpy().tobytes()
    return {
        "every second row": matrix[::2, :192],
        "every second column": matrix[:, ::2][:, :192],
        "every third column of every third row": values.view(20, 800)[::3, ::3][:, :192],
        "transposed": values[: 192 * 33].view(192, 33).t(),
        "rows in the middle": matrix[7:19, :192],
        "columns in the middle": matrix[:, 101:293],
        "storage from element 1": values[1 : 1 + 12 * 192].view(12, 192),
        "storage from byte 1": torch.frombuffer(misaligned, dtype=dtype, offset=1).view(5, 192),
        "one row for all": values[:192].expand(9, 192),
        "one column for all": values[:9, None].expand(9, 192),
        "one value for all": values[:1].expand(9, 192),
        "rows that overlap": values.as_strided((11, 192), (3, 1)),
        "one row of odd strides": values.as_strided((1, 192), (7, 1)),
        "a batch laid out as rows": values[: 4 * 6 * 192].view(4, 6, 192).transpose(0, 1)[3],
    }


def check_layouts(isa: str, dtype: str) -> None:
    for w in layouts(DTYPES[dtype]).values():
        assert w.shape[1] == 192
        for group_size in (1, 3, 32, 64, 192):
            assert_bytes_equal_the_definition(w, group_size, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_in_memory_changes_nothing(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_layouts, forced_isa.isa, dtype)


def around_the_boundaries() -> np.ndarray:
    """3 ulp to each side of every boundary and of every level."""
    points = [*_C.boundaries(), *(float(level) for level in reference.LEVELS if abs(level) < 1)]
    return np.array([ulps_from(point, steps) for point in points for steps in range(-3, 4)], dtype=np.float32)


def check_boundaries(isa: str) -> None:
    quotients = around_the_boundaries()
    rng = np.random.default_rng(3)
    powers = np.ldexp(np.float32(1), np.arange(-126, 127)).astype(np.float32)
    for scales in (powers, powers * rng.uniform(1, 2, powers.size).astype(np.float32)):
        # The first column is the scale itself. Times a power of two the quotients are met exactly, else nearly.
        w = np.concatenate([scales[:, None], scales[:, None] * quotients], axis=1)
        w = np.concatenate([w, np.nextafter(w[:, 1:], np.float32(0)), np.nextafter(w[:, 1:], -w[:, :1])], axis=1)
        w = w[:, : w.shape[1] // 2 * 2]
        assert_bytes_equal_the_definition(torch.from_numpy(np.ascontiguousarray(w)), w.shape[1], isa)
        pairs = np.stack([np.broadcast_to(scales[:, None], w[:, 1:].shape), w[:, 1:]], axis=2)
        assert_bytes_equal_the_definition(torch.from_numpy(pairs.reshape(len(scales), -1)), 2, isa)


def test_ties_and_neighbours_of_every_boundary_at_every_scale(forced_isa: ForcedIsa) -> None:
    forced_isa(check_boundaries, forced_isa.isa)


def check_every_16_bit_value(isa: str, dtype: str) -> None:
    """All values of the type that a scale allows, under scales of every magnitude."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    values = every[every.float().isfinite()].float()
    magnitudes = values[values > 0].sort().values
    for scale in magnitudes[:: len(magnitudes) // 10].tolist():
        w = values[values.abs() <= scale].to(DTYPES[dtype])
        w = torch.cat([w, w[: w.numel() % 2]])
        assert_bytes_equal_the_definition(w.view(1, -1), w.numel(), isa)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_weight_under_scales_of_every_magnitude(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_every_16_bit_value, forced_isa.isa, dtype)


def check_float64(isa: str) -> None:
    """Rounded to float32 first: halfway between two floats, beside that, and beyond the largest."""
    rng = np.random.default_rng(4)
    below = rng.standard_normal((20, 96)).astype(np.float32)
    above = np.nextafter(below, np.float32(np.inf))
    halfway = (below.astype(np.float64) + above.astype(np.float64)) / 2
    for w in (halfway, np.nextafter(halfway, -np.inf), np.nextafter(halfway, np.inf)):
        assert_bytes_equal_the_definition(torch.from_numpy(w), 32, isa)
    small = rng.uniform(-(2.0**-140), 2.0**-140, (4, 64))
    small[2] *= 2.0**-30  # all of it rounds to zero
    assert_bytes_equal_the_definition(torch.from_numpy(small), 32, isa)
    large = rng.uniform(-1, 1, (4, 64))
    large[0, 3], large[1, 40], large[2, 63] = 1e39, -1e300, FLT_MAX * (1 + 2.0**-26)
    assert_bytes_equal_the_definition(torch.from_numpy(large), 32, isa)
    _, scales = torch.ops.squish.quantize_nf4(torch.from_numpy(large), 32)
    assert scales.isnan().tolist() == [[True, False], [False, True], [False, False], [False, False]]
    assert scales[2, 1] == FLT_MAX


def test_float64_is_rounded_to_float32_first_and_may_overflow(forced_isa: ForcedIsa) -> None:
    forced_isa(check_float64, forced_isa.isa)


def awkward_rows(d: int) -> np.ndarray:
    """Rows of d columns, each with values that a kernel may get wrong."""
    rng = np.random.default_rng(5)
    ordinary = rng.standard_normal(d).astype(np.float32)
    subnormal = rng.integers(0, 2**23, d).astype(np.uint32).view(np.float32) * np.sign(ordinary)
    smallest = np.where(ordinary > 0, np.float32(2.0**-149), np.float32(-0.0))
    rows = [np.zeros(d), np.full(d, -0.0), np.where(ordinary > 0, 0.0, -0.0), subnormal, smallest, ordinary]
    rows += [np.full(d, 2.0**-149), np.full(d, -(2.0**-149)), np.full(d, FLT_MAX), np.full(d, -FLT_MAX)]
    rows += [np.clip(ordinary, -1, 1) * FLT_MAX, np.clip(ordinary, -1, 1) * 2.0**-125]
    rows += [np.where(np.arange(d) % 7 == 3, value, ordinary) for value in (FLT_MAX, 2.0**-149, -0.0)]
    return np.array(rows, dtype=np.float32)


def check_awkward_values(isa: str) -> None:
    w = torch.from_numpy(awkward_rows(192))
    assert (w.abs() < 2.0**-126).logical_and(w != 0).any()
    for group_size in (1, 2, 3, 16, 32, 64, 96, 192):
        assert_bytes_equal_the_definition(w, group_size, isa)
        assert_bytes_equal_the_definition(w.double(), group_size, isa)
        assert_bytes_equal_the_definition(w.to(torch.bfloat16), group_size, isa)
        assert_bytes_equal_the_definition(w.clamp(-65504, 65504).half(), group_size, isa)


def test_zeros_subnormals_and_the_largest_floats(forced_isa: ForcedIsa) -> None:
    forced_isa(check_awkward_values, forced_isa.isa)


NON_FINITE = {
    torch.float32: (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
    torch.bfloat16: (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF),
    torch.float16: (0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF),
    torch.float64: (0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, 0x7FF << 52 | 1, 2**64 - 1),
}


def check_non_finite(isa: str, dtype: str) -> None:
    """Infinity and NaN, quiet and signaling, of either sign, at every place of a group: it alone is lost."""
    kind = DTYPES[dtype]
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[kind.itemsize]
    values = torch.from_numpy(np.array(NON_FINITE[kind], dtype=unsigned).view(f"i{kind.itemsize}")).view(kind)
    for group_size in (1, 2, 3, 16, 23, 50):
        places = torch.arange(group_size)
        w = torch.ones(group_size * len(values), 4 * group_size, dtype=kind)
        for i, value in enumerate(values):
            w[places * len(values) + i, group_size + places] = value
        assert int((~w.isfinite()).sum()) == w.shape[0]
        assert_bytes_equal_the_definition(w, group_size, isa)
        packed, scales = torch.ops.squish.quantize_nf4(w, group_size)
        assert torch.equal(scales.isnan(), torch.tensor([False, True, False, False]).expand_as(scales))
        assert torch.ops.squish.dequantize_nf4(packed, scales, group_size)[:, group_size : 2 * group_size].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_with_nan_or_infinity_gets_a_nan_scale_and_no_other_group_does(forced_isa: ForcedIsa, dtype: str) -> None:
    forced_isa(check_non_finite, forced_isa.isa, dtype)


def check_flush_denormal(isa: str, threads: int) -> None:
    assert _C.cpu_isa() == isa
    rng = np.random.default_rng(6)
    w = rng.integers(0, 2**23, (200, 480)).astype(np.uint32).view(np.float32)
    w[::2] *= -1
    expected_packed, expected_scales = reference.quantize(w, 48)
    expected = reference.dequantize(expected_packed, expected_scales, 48)
    tensor = torch.from_numpy(w)
    torch.set_num_threads(threads)
    assert torch.set_flush_denormal(True)
    try:
        flushed = (torch.full((4,), 2.0**-130) * 2.0).tolist()  # shows that the mode is on in this thread
        packed, scales = torch.ops.squish.quantize_nf4(tensor, 48)
        decoded = torch.ops.squish.dequantize_nf4(packed, scales, 48)
        flushed += (torch.full((4,), 2.0**-130) * 2.0).tolist()  # and that the operators have left it on
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(2)
    assert flushed == [0.0] * 8
    np.testing.assert_array_equal(packed.numpy(), expected_packed)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(decoded.numpy(), expected)
    assert len(np.unique(packed.numpy())) > 100  # flushed to zero, they would all be one byte


@pytest.mark.parametrize("threads", [1, 3])
def test_subnormals_survive_flush_denormal(forced_isa: ForcedIsa, threads: int) -> None:
    forced_isa(check_flush_denormal, forced_isa.isa, threads)


def check_threads(isa: str) -> None:
    rng = np.random.default_rng(7)
    wide = torch.from_numpy(rng.standard_normal((37, 11592)).astype(np.float32))
    one_row = wide.flatten()[: 36 * 9 * 1024].view(1, -1)
    try:
        for w, group_size in ((wide, 24), (wide, 63), (wide[:, :9000], 60), (wide[:, 1:10081], 63), (one_row, 32)):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(torch.ops.squish.quantize_nf4(w, group_size))
            assert_bytes_equal_the_definition(w, group_size, isa)
            for packed, scales in results:
                assert torch.equal(packed, results[0][0])
                assert torch.equal(scales, results[0][1])
    finally:
        torch.set_num_threads(2)


def test_number_of_threads_changes_no_byte(forced_isa: ForcedIsa) -> None:
    forced_isa(check_threads, forced_isa.isa)


@st.composite
def weights_of_any_bits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    group_size = draw(st.integers(1, 70))
    d = math.lcm(2, group_size) * draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), d)
    exponents = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    low, high = min(exponents) << 23, (max(exponents) << 23) + 2**23 - 1
    magnitudes = draw(hypothesis.extra.numpy.arrays(np.uint32, shape, elements=st.integers(low, high)))
    signs = draw(hypothesis.extra.numpy.arrays(np.uint32, shape, elements=st.sampled_from([0, 2**31])))
    return (magnitudes | signs).view(np.float32), group_size


def check_fuzz(isa: str) -> None:
    @hypothesis.settings(EXAMPLES, max_examples=80)
    @hypothesis.given(weights_of_any_bits())
    def fuzz(case: tuple[np.ndarray, int]) -> None:
        w, group_size = case
        assert_bytes_equal_the_definition(torch.from_numpy(w), group_size, isa)

    fuzz()


def test_any_bits_give_the_bytes_of_the_definition(forced_isa: ForcedIsa) -> None:
    forced_isa(check_fuzz, forced_isa.isa)


@pytest.mark.parametrize(("group_size", "expected"), [(16, 0.081), (32, 0.087), (64, 0.092)])
def test_relative_rms_error_of_gaussian_weights_is_the_known_one(
    rng: np.random.Generator, group_size: int, expected: float
) -> None:
    w = torch.from_numpy(rng.standard_normal((512, 2048), dtype=np.float32))
    returned = squish_nf4.dequantize_nf4(*squish_nf4.quantize_nf4(w, group_size), group_size)
    assert float((returned - w).norm() / w.norm()) == pytest.approx(expected, abs=0.001)


def test_a_group_is_encoded_as_if_it_were_alone(rng: np.random.Generator) -> None:
    w = torch.from_numpy(rng.standard_normal((6, 96), dtype=np.float32)) * torch.logspace(-9, 9, 96)
    packed, scales = squish_nf4.quantize_nf4(w, 16)
    for group in range(6):
        alone_packed, alone_scale = squish_nf4.quantize_nf4(w[:, group * 16 : (group + 1) * 16], 16)
        assert torch.equal(packed[:, group * 8 : (group + 1) * 8], alone_packed)
        assert torch.equal(scales[:, group : group + 1], alone_scale)
    assert len(scales.unique()) == 36


@pytest.mark.parametrize("group_size", [2, 3, 16, 48])
def test_group_size_can_be_read_from_the_shapes(rng: np.random.Generator, group_size: int) -> None:
    w = torch.from_numpy(rng.standard_normal((5, 96), dtype=np.float32))
    packed, scales = squish_nf4.quantize_nf4(w, group_size)
    read = 2 * packed.shape[1] // scales.shape[1]
    assert read == group_size
    expected = reference.dequantize(packed.numpy(), scales.numpy(), group_size)
    np.testing.assert_array_equal(squish_nf4.dequantize_nf4(packed, scales, read).numpy(), expected)
