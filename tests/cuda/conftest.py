"""The tests of this folder run on a GPU. Elsewhere they are skipped, or fail if SQUISH_REQUIRE names cuda.

A module that says NEEDS_NO_GPU runs everywhere.
"""

from __future__ import annotations

import pytest
import torch

from squish_nf4 import _build_info
from tests.support.helpers import require


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if getattr(request.module, "NEEDS_NO_GPU", False):
        return
    require("cuda", _build_info.CUDA_VERSION is not None, "squish_nf4 was built for the CPU only")
    require("cuda", torch.cuda.is_available(), "torch finds no GPU")
