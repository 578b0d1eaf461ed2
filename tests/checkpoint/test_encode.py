"""One tensor: what is quantized, what is kept and why, and that what is kept loses nothing."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from squish_nf4.checkpoint.conversion.encode import encode, quantize_tensor
from squish_nf4.checkpoint.conversion.options import ConvertOptions
from squish_nf4.checkpoint.values import smallest_lossless
from squish_nf4.layout import pick_group_size
from tests.support import reference
from tests.support.directories import gaussian

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


def encoded(tensor, name="w", group_size=None, threshold=20.0, **options):
    return encode(name, tensor, ConvertOptions(group_size=group_size, outlier_threshold=threshold, **options))


@pytest.mark.parametrize(
    ("n_cols", "expected"),
    [
        (64, 32),
        (96, 32),
        (32, 16),
        (48, 16),
        (16, 8),
        (8, 4),
        (24, 8),
        (40, 8),
        (12, 4),
        (4, 4),
        (6, 6),
        (30522, 30522),
        (1, 1),
    ],
)
def test_the_group_size_is_the_first_that_divides_into_two_groups_or_more(n_cols, expected):
    assert pick_group_size(n_cols) == expected


def test_the_group_size_can_be_capped():
    assert [pick_group_size(128, cap) for cap in (64, 32, 31, 16, 8, 4, 3)] == [32, 32, 16, 16, 8, 4, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 128), (3, 2, 64), (2, 2, 2, 6), (1, 2), (3000, 700)], ids=str)
def test_bytes_equal_the_definition(shape, dtype):
    w = gaussian(*shape, dtype=dtype)
    arrays = quantize_tensor("w", w)
    rows = w.float().reshape(-1, shape[-1]).numpy()
    packed, scales = reference.quantize(rows, pick_group_size(shape[-1]))
    assert list(arrays) == ["__nf4", "__s_nf4", "__shape"]
    np.testing.assert_array_equal(arrays["__nf4"], packed)
    np.testing.assert_array_equal(arrays["__s_nf4"], scales)
    np.testing.assert_array_equal(arrays["__shape"], np.array(shape, dtype=np.int64))
    assert [array.dtype for array in arrays.values()] == [np.uint8, np.float32, np.int64]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_widened_before_it_is_quantized(dtype):
    w = gaussian(4, 64).to(dtype)
    arrays = quantize_tensor("w", w)
    packed, scales = reference.quantize(w.float().numpy(), 32)
    np.testing.assert_array_equal(arrays["__nf4"], packed)
    np.testing.assert_array_equal(arrays["__s_nf4"], scales)


def test_strided_parameters_are_taken_as_they_are():
    w = torch.nn.Parameter(gaussian(64, 6)).t()
    assert not w.is_contiguous()
    packed, scales = reference.quantize(np.ascontiguousarray(w.detach().numpy()), 32)
    arrays = quantize_tensor("w", w)
    np.testing.assert_array_equal(arrays["__nf4"], packed)
    np.testing.assert_array_equal(arrays["__s_nf4"], scales)


def test_a_group_size_of_ones_own_must_divide():
    w = gaussian(2, 96)
    assert quantize_tensor("w", w, group_size=48)["__s_nf4"].shape == (2, 2)
    with pytest.raises(ValueError, match="'w' has 96 columns, not a multiple of group_size=64"):
        quantize_tensor("w", w, group_size=64)


KEPT = {
    "1-D": (torch.ones(8), "1-D"),
    "0-D": (torch.tensor(2.5), "0-D"),
    "empty rows": (torch.ones(0, 8), "empty"),
    "empty columns": (torch.ones(8, 0), "empty"),
    "odd": (torch.ones(2, 7), r"odd number of columns \(7\)"),
    "3x3 convolution": (torch.ones(4, 4, 3, 3), r"odd number of columns \(3\)"),
    "bool": (torch.ones(2, 8, dtype=torch.bool), "bool is not a floating-point type"),
    "int64": (torch.full((2, 8), 2**62 + 1), "int64 is not"),
    "uint16": (torch.full((2, 8), 65535, dtype=torch.uint16), "uint16 is not"),
    "complex": (torch.full((2, 8), 1 + 2j), "complex64 is not"),
    "scales": (torch.ones(2, 8).to(torch.float8_e8m0fnu), "float8_e8m0fnu is not a type of weights"),
    "beyond float32": (torch.tensor([[1e300, 1.0]], dtype=torch.float64), "holds values beyond float32"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_a_float_matrix_is_kept_with_its_values_and_shape(kind):
    tensor, reason = KEPT[kind]
    result = encoded(tensor)
    assert (result.kind, result.group_size, result.relative_error) == ("kept", None, 0.0)
    assert re.search(reason, result.reason)
    np.testing.assert_array_equal(result.arrays["__shape"], np.array(tuple(tensor.shape), dtype=np.int64))
    values = (tensor.float() if tensor.dtype == torch.float8_e8m0fnu else tensor).numpy()
    assert result.arrays["__pt"].shape == values.shape
    assert result.arrays["__pt"].dtype.kind == values.dtype.kind
    np.testing.assert_array_equal(result.arrays["__pt"], values)


@pytest.mark.parametrize("pattern", ["lm_head.weight", "lm_head", "*head*", "*.weight", "lm_h?ad.weight"])
def test_passthrough_takes_a_name_a_part_of_it_or_a_glob(pattern):
    kept = encoded(gaussian(2, 64), name="lm_head.weight", passthrough=["other", pattern])
    assert kept.reason == f"on passthrough ({pattern})"
    assert encoded(gaussian(2, 64), name="LM_Head.Weight", passthrough=["lm_head", "head.weight"]).kind == "nf4"


def with_ratio(ratio: float) -> torch.Tensor:
    """Row 2 has max|w| / (mean|w| + 1e-8) of about ratio: one weight among 1023 of magnitude 1."""
    w = torch.ones(4, 1024)
    w[2, 100] = -ratio * 1023 / (1024 - ratio)
    return w


def test_an_outlier_row_keeps_the_tensor_and_is_named():
    assert encoded(with_ratio(19.99)).kind == "nf4"
    assert encoded(with_ratio(20.01)).reason == "outlier row 2 (max|w| is 20.0 times mean|w|, threshold 20)"
    assert encoded(with_ratio(20.01), threshold=21).kind == "nf4"
    assert encoded(with_ratio(900.0), threshold=math.inf).kind == "nf4"


def test_the_outlier_ratio_is_computed_in_float32():
    w = gaussian(50, 300, seed=3)
    magnitudes = np.abs(w.numpy())
    ratio = (magnitudes.max(axis=1) / (magnitudes.mean(axis=1) + np.float32(1e-8))).max()
    assert ratio.dtype == np.float32
    assert encoded(w, threshold=float(ratio)).kind == "nf4"
    assert encoded(w, threshold=float(np.nextafter(ratio, np.float32(0)))).kind == "kept"


def test_a_float64_row_below_the_range_of_float32_keeps_its_tensor_and_a_single_such_weight_does_not():
    w = gaussian(4, 64, dtype=torch.float64)
    w[1, 1], w[2] = 1e-60, 0
    assert encoded(w).kind == "nf4"
    for factor in (1e-60, 1e-40):
        w[3] = factor * gaussian(64, dtype=torch.float64)
        kept = encode("w", w, ConvertOptions(include=["w"]))
        assert (kept.kind, kept.reason) == ("kept", "holds values beyond float32")
        assert np.array_equal(kept.arrays["__pt"], w.numpy())


def test_rows_beyond_the_first_tile_are_looked_at():
    w = torch.ones(3000, 1024)
    w[2999, 5] = 1000
    assert "outlier row 2999 " in encoded(w).reason
    w[2998, 7] = torch.nan
    with pytest.raises(ValueError, match="row 2998, column 7 is nan"):
        encoded(w)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_non_finite_weight_is_refused_with_its_place(value, dtype):
    w = gaussian(5, 8, dtype=dtype)
    w[3, 5] = value
    w[4, 0] = value
    with pytest.raises(ValueError, match=f"tensor 'layer.w': row 3, column 5 is {value}"):
        quantize_tensor("layer.w", w)


def test_a_non_finite_weight_is_refused_beside_an_outlier():
    w = gaussian(3, 64)
    w[0, 0], w[2, 1] = 1e4, torch.nan
    with pytest.raises(ValueError, match=r"row 2, column 1 is nan.*no large weight saves.*one on passthrough is kept"):
        quantize_tensor("w", w)
    assert quantize_tensor("w", w, passthrough=["w"]).keys() == {"__pt", "__shape"}


def test_a_non_finite_weight_is_refused_beside_a_weight_beyond_float32():
    w = torch.ones(100, 1024, dtype=torch.float64)
    w[0, 0], w[99, 1] = 1e300, torch.nan
    with pytest.raises(ValueError, match="row 99, column 1 is nan"):
        quantize_tensor("w", w)


def test_a_float8_nan_is_refused():
    w = torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="row 0, column 1 is nan"):
        quantize_tensor("w", w)


def test_a_mask_of_infinities_can_be_passed_through():
    mask = torch.full((4, 4), -math.inf).triu(1)
    arrays = quantize_tensor("mask", mask, passthrough=["mask"])
    assert arrays["__pt"].dtype == np.float16
    np.testing.assert_array_equal(arrays["__pt"], mask.numpy())


F16_MAX, F32_MAX = 65504.0, float(np.finfo(np.float32).max)
SMALLEST = [  # value, source dtype, stored dtype
    (1.0, np.float32, np.float16),
    (-0.0, np.float32, np.float16),
    (-0.0, np.float64, np.float16),
    (math.nan, np.float32, np.float16),
    (math.inf, np.float64, np.float16),
    (F16_MAX, np.float32, np.float16),
    (F16_MAX + 16, np.float32, np.float32),  # would round to infinity
    (F16_MAX + 1, np.float32, np.float32),
    (2.0**-24, np.float32, np.float16),  # float16's smallest subnormal
    (2.0**-25, np.float32, np.float32),
    (-(2.0**-30), np.float32, np.float32),  # would become -0.0
    (2.0**-149, np.float32, np.float32),
    (1.0 + 2.0**-10, np.float32, np.float16),
    (1.0 + 2.0**-11, np.float32, np.float32),
    (1.0 + 2.0**-23, np.float64, np.float32),
    (1.0 + 2.0**-24, np.float64, np.float64),
    (2.0**-149, np.float64, np.float32),
    (2.0**-150, np.float64, np.float64),
    (F32_MAX, np.float64, np.float32),
    (1e39, np.float64, np.float64),
    (1.0 / 3, np.float16, np.float16),
    (7, np.int64, np.int64),
    (1, np.bool_, np.bool_),
    (1.0, np.complex64, np.complex64),
]


@pytest.mark.parametrize(("value", "source", "stored"), SMALLEST)
def test_a_kept_value_takes_the_smallest_float_that_loses_nothing(value, source, stored):
    values = np.array([0.5 if np.dtype(source).kind == "f" else 0, value], dtype=source)
    result = smallest_lossless(values)
    assert result.dtype == stored
    back = result.astype(source)
    np.testing.assert_array_equal(back, values)
    if values.dtype.kind == "f":
        np.testing.assert_array_equal(
            np.signbit(back[1:])[~np.isnan(values[1:])], np.signbit(values[1:])[~np.isnan(values[1:])]
        )


def test_nan_payloads_do_not_widen_a_kept_tensor():
    payloads = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FC01234], dtype=np.uint32).view(np.float32)
    result = smallest_lossless(payloads)
    assert result.dtype == np.float16
    assert np.isnan(result).all()


def test_one_value_late_in_a_long_tensor_decides():
    values = np.zeros(2**21 + 5, dtype=np.float32)
    assert smallest_lossless(values).dtype == np.float16
    values[-1] = 2.0**-30
    assert smallest_lossless(values).dtype == np.float32


def test_a_lost_subnormal_is_seen_where_the_process_flushes_them():
    values = np.array([2.0**-140, 1.0], dtype=np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert smallest_lossless(values).dtype == np.float32
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.float8_e8m0fnu, torch.bfloat16], ids=str)
def test_every_code_of_a_float_that_numpy_lacks_comes_back(dtype):
    integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(integer)
    tensor = codes.view(dtype)
    stored = quantize_tensor("w", tensor)["__pt"]
    assert stored.dtype == (np.float32 if dtype in (torch.bfloat16, torch.float8_e8m0fnu) else np.float16)
    back = torch.from_numpy(stored).float().to(dtype)
    numbers = ~tensor.float().isnan()
    torch.testing.assert_close(back.view(integer)[numbers], codes[numbers], rtol=0, atol=0)
    assert back.float().isnan()[~numbers].all()


def with_super_weight(ratio: float) -> torch.Tensor:
    """Row 1 has max|w| / mean|w| of about ratio, and weights so small that 1e-8 beside their mean is much."""
    w = torch.ones(2, 4096)
    w[1, 7] = ratio * 4095 / (4096 - ratio)
    return w * 1e-9


def test_a_super_weight_keeps_the_tensor_if_asked_for():
    assert encoded(with_super_weight(101)).kind == "nf4"  # by the outlier rule it is none
    kept = encoded(with_super_weight(101), super_weight=True)
    assert kept.reason == "super weight in row 1 (max|w| is 101.0 times mean|w|)"
    assert encoded(with_super_weight(99), super_weight=True).kind == "nf4"
    assert encoded(with_ratio(900), threshold=math.inf, super_weight=True).reason.startswith("super weight in row 2")
    assert encoded(torch.zeros(2, 64), super_weight=True).kind == "nf4"


@pytest.mark.parametrize("name", ["model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"])
def test_routers_are_kept_by_default_unless_included(name):
    assert encoded(gaussian(8, 64), name=name).reason.startswith("on passthrough (")
    assert encoded(gaussian(8, 64), name=name, include=["layers.0"]).kind == "nf4"
    assert encoded(gaussian(8, 64), name="model.layers.0.mlp.gate_proj.weight").kind == "nf4"


def test_include_quantizes_in_spite_of_large_weights_and_passthrough_goes_before_it():
    spiky = with_ratio(900)
    assert encoded(spiky, super_weight=True, include=["other"]).kind == "kept"
    assert encoded(spiky, super_weight=True, include=["*w*"]).kind == "nf4"
    assert encoded(spiky, include=["w"], passthrough=["w"]).reason == "on passthrough (w)"


@pytest.mark.parametrize("kind", KEPT)
def test_include_quantizes_nothing_that_nf4_cannot_hold(kind):
    tensor, reason = KEPT[kind]
    assert re.search(reason, encoded(tensor, include=["w"]).reason)


def test_quantize_tensor_takes_the_options_of_a_conversion():
    assert "__pt" in quantize_tensor("w", with_super_weight(101), super_weight=True)
    assert "__nf4" in quantize_tensor("w", with_ratio(900), include=["w"])


def test_the_relative_error_is_that_of_the_definition():
    w = gaussian(2000, 1024)
    result = encoded(w)
    exact = w.double().numpy()
    lost = exact - reference.dequantize(result.arrays["__nf4"], result.arrays["__s_nf4"], 32)
    assert result.relative_error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(exact), rel=1e-12)
    assert result.relative_error == pytest.approx(0.0873, abs=0.001)


def test_zeros_have_no_error():
    assert encoded(torch.zeros(4, 64)).relative_error == 0.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"outlier_threshold": -1}, ValueError, "outlier_threshold must be 0 or more, got -1"),
        ({"outlier_threshold": math.nan}, ValueError, "outlier_threshold must be 0 or more, got nan"),
        ({"passthrough": "lm_head"}, TypeError, "passthrough must be a list of names, got the string 'lm_head'"),
        ({"passthrough": ["a", ""]}, ValueError, "passthrough holds an empty name"),
        ({"include": "lm_head"}, TypeError, "include must be a list of names, got the string 'lm_head'"),
        ({"include": [""]}, ValueError, "include holds an empty name"),
    ],
)
def test_a_wrong_option_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        quantize_tensor("w", gaussian(2, 64), **options)


def test_a_dtype_that_numpy_cannot_hold_is_refused_by_name():
    packed_floats = torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match=r"tensor 'w': numpy cannot hold torch.float4_e2m1fn_x2"):
        quantize_tensor("w", packed_floats)


@pytest.mark.parametrize("value", [None, 3, 1.5, [1.0], np.zeros((2, 8), np.float32)], ids=lambda v: type(v).__name__)
def test_what_is_no_tensor_is_refused_by_name_and_type(value: Any) -> None:
    """As a state dict may hold it, beside its tensors."""
    with pytest.raises(TypeError, match=rf"tensor 'step': a torch tensor is wanted, got {type(value).__name__}"):
        quantize_tensor("step", value)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="the name of a tensor must be a string, got 3"):
        quantize_tensor(3, torch.zeros(2, 8))  # type: ignore[arg-type]
