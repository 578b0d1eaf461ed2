"""The definition of NF4 in numpy, typed apart from the library: slow, obvious, and with a table of its own."""

from __future__ import annotations

import numpy as np

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


def quantize(w: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """w (n, d) float32 -> packed (n, d/2) uint8, scales (n, d/group_size) float32."""
    assert w.dtype == np.float32
    n, d = w.shape
    assert d % 2 == 0
    assert d % group_size == 0
    groups = w.reshape(n, d // group_size, group_size)

    scales = np.abs(groups).max(axis=2)
    scales[scales == 0] = 1.0
    finite = np.isfinite(groups).all(axis=2)
    scales[~finite] = np.nan

    with np.errstate(invalid="ignore"):
        quotients = groups / scales[:, :, np.newaxis]
        distances = np.abs(quotients[..., np.newaxis] - LEVELS)
    indices = np.argmin(distances, axis=-1).astype(np.uint8)  # the first of equals: the lower index on a tie
    indices[~finite] = 0

    columns = indices.reshape(n, d)
    packed = columns[:, 0::2] | (columns[:, 1::2] << 4)
    return packed, scales


def dequantize(packed: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """packed (n, d/2) uint8, scales (n, d/group_size) float32 -> w (n, d) float32."""
    assert packed.dtype == np.uint8
    assert scales.dtype == np.float32
    n, half = packed.shape
    indices = np.empty((n, 2 * half), dtype=np.uint8)
    indices[:, 0::2] = packed & 15
    indices[:, 1::2] = packed >> 4
    return LEVELS[indices] * np.repeat(scales, group_size, axis=1)
