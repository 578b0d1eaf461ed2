"""The table of csrc/nf4/codebook.h: its numbers, and the boundaries it derives."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import squish_nf4
from squish_nf4 import _C
from tests.support import ROOT, reference
from tests.support.cases import ulps_from

# fmt: off
BOUNDARIES = [float.fromhex(digits) for digits in [
    "-0x1.b239b2p-1", "-0x1.38a4e2p-1", "-0x1.d709p-2", "-0x1.5bd4eep-2", "-0x1.e079dap-3", "-0x1.1a7178p-3",
    "-0x1.74f0e2p-5", "0x1.45f5fep-5", "0x1.ec90c4p-4", "0x1.a0cfcp-3", "0x1.2b05a8p-2", "0x1.8ea7f2p-2",
    "0x1.00da06p-1", "0x1.491b5ep-1", "0x1.b913b2p-1",
]]
# fmt: on


def nearest_level(x: np.float32) -> int:
    return int(np.argmin(np.abs(x - reference.LEVELS)))


def test_levels_are_those_of_the_format() -> None:
    assert _C.codebook() == tuple(float(level) for level in reference.LEVELS)


def test_boundaries_are_those_of_the_format() -> None:
    assert _C.boundaries() == tuple(BOUNDARIES)


@pytest.mark.parametrize("k", range(15))
def test_boundary_is_the_last_float_that_is_not_nearer_to_the_level_above(k: int) -> None:
    boundary = _C.boundaries()[k]
    for steps in range(-3, 4):
        assert nearest_level(ulps_from(boundary, steps)) == (k + 1 if steps > 0 else k)


def test_six_boundaries_are_not_the_rounded_midpoints() -> None:
    levels = reference.LEVELS.astype(np.float64)
    midpoints = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    assert [k for k in range(15) if midpoints[k] != np.float32(_C.boundaries()[k])] == [0, 1, 3, 4, 12, 14]


@pytest.mark.parametrize("shape", [(0,), (1,), (1001,), (3, 5), (0, 4), (2, 3, 4)], ids=str)
def test_bytes_are_unpacked_even_column_first(shape: tuple[int, ...]) -> None:
    packed = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    indices = _C.unpack_indices(packed)
    assert (indices.dtype, indices.shape) == (np.uint8, (*shape, 2))
    np.testing.assert_array_equal(indices, np.stack([packed & 15, packed >> 4], axis=-1))


def test_bytes_anywhere_in_memory_are_unpacked() -> None:
    packed = np.random.default_rng(1).integers(0, 256, (64, 34), np.uint8)
    read_only = packed.copy()
    read_only.flags.writeable = False
    for view in (packed[:, ::2], packed.T, packed[:, 3:8], read_only):
        np.testing.assert_array_equal(_C.unpack_indices(view), _C.unpack_indices(view.copy()))


def test_unpacked_indices_are_what_the_operator_decodes() -> None:
    packed, scales = squish_nf4.quantize_nf4(torch.randn(6, 96), 32)
    level = np.array(_C.codebook(), np.float32)[_C.unpack_indices(packed.numpy()).reshape(6, 96)]
    expected = squish_nf4.dequantize_nf4(packed, scales, 32).numpy()
    np.testing.assert_array_equal(level * scales.numpy().repeat(32, axis=1), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32])
def test_what_is_not_bytes_is_not_unpacked(dtype: type) -> None:
    with pytest.raises(TypeError):
        _C.unpack_indices(np.zeros(4, dtype))


def test_row_worked_by_hand_in_the_docs_is_what_the_operator_writes() -> None:
    """The first Python block of docs/format.md, run as it stands there."""
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    assert "assert" in block
    exec(block, {"torch": torch, "squish_nf4": squish_nf4})
