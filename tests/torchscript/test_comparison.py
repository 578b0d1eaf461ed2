"""When two results are equal, nearly equal, or different."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from squish_nf4.torchscript.comparison import compare
from squish_nf4.torchscript.trial_program import results

ONE = torch.tensor([1.0, -2.0])
NAN = torch.tensor([1.0, math.nan])
INTS = torch.tensor([1, 2])
COMPLEX = torch.tensor([0.6 + 0.8j])
BESIDE_LARGE = torch.tensor([[1e6, 1.0], [1e6, -2.0], [1e6, 3.0]])  # 1e-3 is much in its second column
BITS = torch.tensor([1, 2], dtype=torch.uint8).view(torch.bits8)  # no numbers


@pytest.mark.parametrize(
    ("found", "expected", "same_bits", "difference"),
    [
        (ONE, ONE, True, 0.0),
        ((ONE, {"a": [INTS]}), [ONE, {"a": (INTS,)}], True, 0.0),  # a list for a tuple: TorchScript's choice
        ({"a": 1, "b": None}, {"a": 1, "b": None}, True, 0.0),
        (NAN, NAN.clone(), True, 0.0),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False, 0.0),
        (ONE + 1e-5, ONE, False, 1e-5),
        (ONE.bfloat16(), torch.tensor([1.0, -2.015625]).bfloat16(), False, 0.015625),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), True, 0.0),
        (torch.empty(0, 3), torch.empty(0, 3), True, 0.0),
        (math.nan, math.nan, True, 0.0),
        (INTS > 1, INTS > 1, True, 0.0),
        (COMPLEX.conj(), COMPLEX.conj().clone(), True, 0.0),
        (COMPLEX.conj().imag, -COMPLEX.imag, True, 0.0),  # with the negative bit set
        (COMPLEX + 2**-20, COMPLEX, False, 2**-20),
        (ONE.to_sparse(), ONE.to_sparse(), True, 0.0),
        ((ONE + 1e-5).to_sparse(), ONE.to_sparse(), False, 1e-5),
        (torch.tensor([[1.0, 2.0, 1e-9 + 1e-7]]), torch.tensor([[1.0, 2.0, 1e-9]]), False, 1e-7),  # of what cancelled
    ],
)
def test_equal_and_nearly_equal(found: Any, expected: Any, same_bits: bool, difference: float) -> None:
    agreement = compare(results(found), results(expected))
    assert agreement.misfit is None
    assert agreement.same_bits is same_bits
    assert agreement.difference == pytest.approx(difference, rel=0.02)


@pytest.mark.parametrize(
    ("found", "expected", "misfit"),
    [
        (ONE + 1e-3, ONE, "result differs from eager by up to 0.001"),
        (ONE, NAN, "result differs from eager by up to inf"),
        (INTS + 1, INTS, "result differs from eager by up to 1"),
        (ONE.double(), ONE, "result is torch.float64 (2,); eager gives torch.float32 (2,)"),
        ((ONE, ONE[:1]), (ONE, ONE), "result[1] is torch.float32 (1,); eager gives torch.float32 (2,)"),
        ({"a": True}, {"a": 1}, "result['a'] is True; eager gives 1"),
        ({"a": ONE}, {"b": ONE}, "it returns result['a']; eager returns result['b']"),
        ((), ONE, "it returns nothing; eager returns result"),
        (math.nan, 1.0, "result is nan; eager gives 1.0"),
        (INTS > 1, INTS > 0, "result differs from eager by up to 1"),
        (INTS + (1 << 60) + 1, INTS + (1 << 60), "result differs from eager by up to 0"),  # in float64, that is
        (ONE.to_sparse(), ONE, "result is torch.sparse_coo torch.float32 (2,); eager gives torch.float32 (2,)"),
        ((2 * ONE).to_sparse(), ONE.to_sparse(), "result differs from eager by up to 2"),
        (BESIDE_LARGE * 1.005, BESIDE_LARGE, "result differs from eager by up to 5e+03"),
        (BESIDE_LARGE + 1e-3, BESIDE_LARGE, "result differs from eager by up to 0.001"),
    ],
)
def test_different(found: Any, expected: Any, misfit: str) -> None:
    assert compare(results(found), results(expected)).misfit == misfit


def test_an_error_is_a_difference() -> None:
    assert compare("RuntimeError: no", [("", ONE)]).misfit == "RuntimeError: no"


def test_what_cannot_be_compared_is_a_difference_and_no_error() -> None:
    misfit = compare(results(BITS), results(BITS[:1].expand(2))).misfit
    assert misfit is not None
    assert misfit.startswith("result cannot be compared with eager's: ")
