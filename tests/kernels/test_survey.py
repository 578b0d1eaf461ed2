"""_survey_nf4: what each row and its NF4 form say about each other, in float64, to the bit the same on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from squish_nf4 import _C
from tests.support.helpers import ForcedIsa

OPS = torch.ops.squish
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 64, 32), (3, 100, 50), (7, 1030, 5), (4, 2, 1), (2, 4096, 64), (3, 0, 4), (0, 64, 16), (70, 600, 600)]


def weight(n: int, d: int, dtype: torch.dtype) -> Tensor:
    rng = np.random.default_rng(n * 10000 + d)
    return torch.from_numpy(rng.standard_normal((n, d)) * np.exp2(rng.integers(-10, 10, (n, 1)))).to(dtype)


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
    with pytest.raises(ValueError, match=r"_survey_nf4: w has shape \[4, 32\] but packed holds 4 rows and 64 columns"):
        OPS._survey_nf4(w[:, :32], packed, scales, 32)
    with pytest.raises(ValueError, match="_survey_nf4: w must be 2-D"):
        OPS._survey_nf4(w[0], packed, scales, 32)
    with pytest.raises(TypeError, match="_survey_nf4: w must be float32, bfloat16, float16 or float64"):
        OPS._survey_nf4(w.int(), packed, scales, 32)
    with pytest.raises(RuntimeError, match="packed"):
        OPS._survey_nf4(w, packed.to("meta"), scales.to("meta"), 32)
