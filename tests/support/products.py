"""How near a product has to come to the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.helpers import relative


def spread(a: Tensor, b: Tensor) -> float:
    """The norm of a @ b with random signs: a single sum that happens to cancel is no measure of its own error."""
    return float((a.double().square() @ b.double().square()).sum().sqrt())


def assert_product(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, what: object) -> None:
    """float32 within 1e-6 of float64, 16 bits within an ulp; or 1.2 times what dense torch makes of the same weight."""
    assert found.dtype == a.dtype
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    cancelled = max(1.0, spread(a, b) / float(exact.norm()))
    product = a @ b.to(a.dtype)
    dense = product if bias is None else (product.float() + bias.float()).to(a.dtype)
    own = 1e-6 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps / 2
    allowed = max(1.2 * relative(dense, exact), own * cancelled)
    assert relative(found, exact) <= allowed, what
