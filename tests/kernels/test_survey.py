"""_survey_nf4: what each row and its NF4 form say about each other, in float64, to the bit the same on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from squish_nf4 import _C
from tests.support.helpers import ForcedIsa

OPS = torch.ops.squish
PADDED = [(5, 61, 32), (3, 99, 50), (4, 1028, 5), (2, 3, 3), (3, 1, 64), (6, 700, 512), (2, 1030, 1024), (0, 31, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 64, 32), (3, 100, 50), (7, 1030, 5), (4, 2, 1), (2, 4096, 64), (3, 0, 4), (0, 64, 16), (70, 600, 600)]


def weight(n: int, d: int, dtype: torch.dtype) -> Tensor:
    rng = np.random.default_rng(n * 10000 + d)
    return torch.from_numpy(rng.standard_normal((n, d)) * np.exp2(rng.integers(-10, 10, (n, 1)))).to(dtype)


def padded(w: Tensor, group_size: int) -> Tensor:
    return torch.nn.functional.pad(w, (0, -w.shape[1] % math.lcm(2, group_size)))


def surveys(isa: str) -> list[bytes]:
    """Of every case, compared with numpy's sums; as bytes."""
    assert _C.cpu_isa() == isa
    found = []
    for dtype in DTYPES:
        for n, d, group_size in SHAPES:
            w = weight(n, d, dtype)
            packed, scales = OPS.quantize_nf4(w, group_size)
            survey = OPS._survey_nf4(w, packed, scales, group_size)
            assert (survey.dtype, survey.shape) == (torch.float64, (n, 4))
            exact = w.float().numpy()
            lost = (exact - OPS.dequantize_nf4(packed, scales, group_size).numpy()).astype(np.float64)
            wide = exact.astype(np.float64)
            expected = [np.abs(wide).max(1, initial=0), np.abs(wide).sum(1), (wide**2).sum(1), (lost**2).sum(1)]
            np.testing.assert_allclose(survey.numpy().T, expected, rtol=1e-13)
            strided = torch.empty(n, 2 * d + 1, dtype=dtype)[:, : 2 * d : 2].copy_(w)
            for other in (strided, torch.cat([w, w], 1)[:, :d]):
                assert torch.equal(OPS._survey_nf4(other, packed, scales, group_size), survey)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(OPS._survey_nf4(w, packed, scales, group_size), survey)
            torch.set_num_threads(2)
            found.append(survey.numpy().tobytes())
    return found


@pytest.fixture(scope="module")
def of_this_path() -> list[bytes]:
    return surveys(_C.cpu_isa())


def test_every_path_gives_the_definition_and_the_same_bits(forced_isa: ForcedIsa, of_this_path: list[bytes]) -> None:
    assert forced_isa(surveys, forced_isa.isa) == of_this_path


def surveys_of_padded_weights(isa: str) -> None:
    assert _C.cpu_isa() == isa
    for dtype in DTYPES:
        for n, d, group_size in PADDED:
            w = weight(n, d, dtype)
            whole = padded(w, group_size)
            packed, scales = OPS.quantize_nf4(whole, group_size)
            survey = OPS._survey_nf4(w, packed, scales, group_size)
            assert torch.equal(survey, OPS._survey_nf4(whole, packed, scales, group_size)), (dtype, n, d, group_size)
            strided = torch.empty(n, 2 * d + 1, dtype=dtype)[:, 1::2].copy_(w)
            assert torch.equal(OPS._survey_nf4(strided, packed, scales, group_size), survey)


def test_padding_counts_as_nothing(forced_isa: ForcedIsa) -> None:
    forced_isa(surveys_of_padded_weights, forced_isa.isa)


def test_what_padding_holds_does_not_matter() -> None:
    packed, scales = OPS.quantize_nf4(padded(weight(4, 61, torch.float32), 64), 64)
    survey = OPS._survey_nf4(weight(4, 61, torch.float32), packed, scales, 64)
    packed[:, 31] = 0x5A
    packed[:, 30] = packed[:, 30] & 15 | 0xF0  # column 60, which w has, and 61
    assert torch.equal(OPS._survey_nf4(weight(4, 61, torch.float32), packed, scales, 64), survey)


@pytest.mark.parametrize("d", [64, 61, 33])
def test_meta_and_fake_tensors_have_the_shape_alone(d: int) -> None:
    w = torch.empty(5, d, dtype=torch.bfloat16)
    packed, scales = torch.empty(5, 32, dtype=torch.uint8), torch.empty(5, 2)
    on_meta = OPS._survey_nf4(w.to("meta"), packed.to("meta"), scales.to("meta"), 32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = OPS._survey_nf4(w, packed, scales, 32)
    for survey in (on_meta, fake):
        assert (survey.shape, survey.dtype) == ((5, 4), torch.float64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 70, 99])
def test_what_is_not_finite_shows_in_the_largest_magnitude_of_its_row(column: int, value: float) -> None:
    w = torch.ones(3, 100)
    w[1, column] = value
    largest = OPS._survey_nf4(w, *OPS.quantize_nf4(w, 50), 50)[:, 0]
    assert largest.isfinite().tolist() == [True, False, True]


def test_another_shape_dtype_or_device_is_refused() -> None:
    w = torch.ones(4, 64)
    packed, scales = OPS.quantize_nf4(w, 32)
    wanted = r"\(as many, or up to 31 more as padding, are wanted at group_size=32\)"
    for d in (32, 66):
        with pytest.raises(ValueError, match=f"_survey_nf4: w has {d} columns but packed holds 64 {wanted}"):
            OPS._survey_nf4(torch.ones(4, d), packed, scales, 32)
    with pytest.raises(ValueError, match="_survey_nf4: w has 3 rows but packed has 4"):
        OPS._survey_nf4(w[:3], packed, scales, 32)
    with pytest.raises(ValueError, match="_survey_nf4: w must be 2-D"):
        OPS._survey_nf4(w[0], packed, scales, 32)
    with pytest.raises(TypeError, match="_survey_nf4: w must be float32, bfloat16, float16 or float64"):
        OPS._survey_nf4(w.int(), packed, scales, 32)
    with pytest.raises(RuntimeError, match="packed"):
        OPS._survey_nf4(w, packed.to("meta"), scales.to("meta"), 32)
