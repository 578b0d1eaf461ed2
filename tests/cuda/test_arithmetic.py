"""What csrc/cuda/quantize.cu claims of its arithmetic, in numpy: the index is that of the correctly rounded quotient,
found without a division. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest

from squish_nf4 import _C

NEEDS_NO_GPU = True

Floats = np.ndarray


def boundaries() -> Floats:
    return np.array(_C.boundaries(), dtype=np.float32)


def index_of(quotients: Floats) -> Floats:
    """How many boundaries lie below."""
    return np.searchsorted(boundaries(), quotients, side="left")


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a b + c, rounded once: the product of floats is exact in float64, and so nearly is the sum."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_product_with_the_reciprocal_finds_the_index_of_every_pair_of_16_bit_weights(name: str, bits: int) -> None:
    """Every pair of significands, w up to 2^7 times smaller than the scale: below that all indices are that of zero."""
    significands = np.arange(2 ** (bits - 1), 2**bits, dtype=np.float32) / np.float32(2 ** (bits - 1))
    reciprocals = np.float32(1) / significands
    for gap in range(8):
        w = significands * np.float32(2.0**-gap)
        for scale, reciprocal in zip(significands, reciprocals, strict=True):
            own = w[w <= scale]
            for signed in (own, -own):
                assert np.array_equal(index_of(signed * reciprocal), index_of(signed / scale)), (name, gap, scale)


def test_one_newton_step_finds_the_index_of_the_rounded_quotient() -> None:
    rng = np.random.default_rng(11)
    scales = np.concatenate([rng.uniform(1, 2, 20_000), [1, 2 - 2.0**-23, 1 + 2.0**-23, 1.5]]).astype(np.float32)
    for exponent in (0, -99, 97, -60, 31):
        scale = np.ldexp(scales, exponent)
        reciprocal = np.float32(1) / scale
        for boundary in boundaries():
            nearest = scale * boundary
            for steps in range(-3, 4):
                w = (nearest.view(np.int32) + np.int32(steps)).view(np.float32)
                near = w * reciprocal
                quotient = fused(fused(-near, scale, w), reciprocal, near)
                assert np.array_equal(index_of(quotient), index_of(w / scale)), (exponent, boundary, steps)


def test_one_product_would_not_do_for_float32() -> None:
    rng = np.random.default_rng(12)
    scale = rng.uniform(1, 2, 20_000).astype(np.float32)
    wrong = 0
    for boundary in boundaries():
        w = scale * boundary
        wrong += int((index_of(w * (np.float32(1) / scale)) != index_of(w / scale)).sum())
    assert wrong > 100
