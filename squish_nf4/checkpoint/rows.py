"""A matrix looked at some rows at a time, so that copies of them stay small beside it."""

from __future__ import annotations

from collections.abc import Iterator


def rows_at_once(columns: int, values: int) -> int:
    """As many whole rows as hold so many values, one at least."""
    return max(1, values // max(1, columns))


def row_slices(rows: int, columns: int, values: int) -> Iterator[slice]:
    step = rows_at_once(columns, values)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
