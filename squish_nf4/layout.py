"""Arithmetic on shapes: group sizes, padding, bits per weight. No tensors."""

from __future__ import annotations

from math import lcm

INDEX_BITS, SCALE_BITS = 4, 32


def pick_group_size(n_cols: int, max_group_size: int = 32) -> int:
    """The group size that checkpoints use for a row of ``n_cols`` columns.

    The first of 32, 16, 8 and 4 (at most ``max_group_size``) that divides ``n_cols`` and fits into it at least twice;
    if there is none, the whole row is one group.

    Raises:
        ValueError: n_cols or max_group_size is not positive.
    """
    if n_cols < 1 or max_group_size < 1:
        raise ValueError(f"pick_group_size: n_cols and max_group_size must be positive, got {n_cols}, {max_group_size}")
    for group_size in (32, 16, 8, 4):
        if group_size <= max_group_size and n_cols % group_size == 0 and n_cols >= 2 * group_size:
            return group_size
    return n_cols


def padded_columns(n_cols: int, group_size: int) -> int:
    """The columns that are stored for ``n_cols``: the next multiple of both 2 and ``group_size``."""
    block = lcm(2, group_size)
    return -(-n_cols // block) * block


def effective_group_size(n_cols: int, group_size: int) -> int:
    """The group size of a layer that was asked for ``group_size``.

    A row shorter than one group would be mostly padding; there it is the size of at most ``group_size`` that pads
    least, the largest of them on a tie. Otherwise it is ``group_size``.
    """
    if n_cols >= group_size or n_cols == 0:
        return group_size
    return min(_sizes(n_cols, group_size), key=lambda size: padded_columns(n_cols, size))


def _sizes(n_cols: int, group_size: int) -> range:
    """The group sizes worth a look, the largest first: one beyond n_cols + 1 only pads more."""
    return range(min(group_size, n_cols + 1), 0, -1)


def stored_bits(n_cols: int, group_size: int) -> int:
    """Bits of one stored row: an index per column, padding included, and a scale per group."""
    columns = padded_columns(n_cols, group_size)
    return INDEX_BITS * columns + SCALE_BITS * (columns // group_size)


def cheapest_group_size(n_cols: int, group_size: int) -> int:
    """The group size of at most ``group_size`` that stores a row in the fewest bits, the largest of them on a tie.

    It is ``group_size`` itself wherever that divides ``n_cols``, and in wide rows. In narrow rows that it does not
    divide, padding up to a whole group can cost more than smaller groups do: 65 columns take 576 bits at group size 64
    and 328 at 33.
    """
    if n_cols == 0:
        return group_size
    return min(_sizes(n_cols, group_size), key=lambda size: stored_bits(n_cols, size))


def stored_bits_per_weight(columns: int, group_size: int | None, itemsize: int) -> float:
    """Bits of a stored weight: in NF4 with this group size, or, if it is None, kept in a type of so many bytes."""
    return bits_per_weight(columns, group_size) if group_size else 8.0 * itemsize


def bits_per_weight(n_cols: int, group_size: int) -> float:
    """Stored bits over logical weights; 0.0 for an empty row."""
    return stored_bits(n_cols, group_size) / n_cols if n_cols else 0.0
