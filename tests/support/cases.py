"""What tests are tried on: group sizes, shapes, the neighbours of a float, and how hypothesis makes examples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import hypothesis
import numpy as np

GROUP_SIZES = (1, 2, 3, 16, 32, 64, 100)
EXAMPLES = hypothesis.settings(  # the same on every run, however long they take
    database=None, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


def shapes() -> Iterator[tuple[int, int, int]]:
    """(n, d, group_size)"""
    for group_size in GROUP_SIZES:
        block = math.lcm(2, group_size)
        for d in (0, block, 2 * block, 3 * block, 1030 // block * block):
            for n in (0, 1, 2, 5):
                yield n, d, group_size
    for d in (2, 6, 16, 34, 100, 1026):
        for n in (0, 1, 3):
            yield n, d, d


def ulps_from(x: float, steps: int) -> np.float32:
    """The float32 ``steps`` places above x, or below it if negative."""
    value = np.float32(x)
    for _ in range(abs(steps)):
        value = np.nextafter(value, np.float32(np.inf if steps > 0 else -np.inf))
    return value
