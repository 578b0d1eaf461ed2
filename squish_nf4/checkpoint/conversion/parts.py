"""What is done with one stretch of a tensor, which is read for that. Any thread may do it; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from squish_nf4.checkpoint.conversion.encode import EncodedRows, Survey, encode_rows
from squish_nf4.checkpoint.conversion.plan import Planned
from squish_nf4.checkpoint.source.shards import read_values
from squish_nf4.checkpoint.values import Array, in_dtype, smallest_dtype, to_numpy

Stretch = tuple[int, int]  # first value, values


@dataclass(frozen=True)
class KeptPart:
    """What a stretch of a tensor asks of the dtype it is kept in, and whether all of it is finite."""

    dtype: np.dtype[np.generic]
    finite: bool


def look_at(planned: Planned, stretch: Stretch) -> EncodedRows | KeptPart:
    """Encodes it if its tensor goes to NF4."""
    return (
        look_at_kept(planned, stretch) if planned.group_size is None else encode(planned, stretch, planned.group_size)
    )


def survey(planned: Planned, stretch: Stretch) -> Survey:
    """Of a tensor that goes to NF4."""
    assert planned.group_size is not None
    return encode(planned, stretch, planned.group_size).survey


def encode(planned: Planned, stretch: Stretch, group_size: int) -> EncodedRows:
    w = read_values(planned.entry, *stretch).view(-1, planned.columns)
    return encode_rows(planned.entry.name, stretch[0] // planned.columns, w, group_size, planned.limits)


def look_at_kept(planned: Planned, stretch: Stretch) -> KeptPart:
    values = to_numpy(read_values(planned.entry, *stretch))
    return KeptPart(smallest_dtype(values), bool(np.isfinite(values).all()))


def kept_values(planned: Planned, stretch: Stretch, dtype: np.dtype[np.generic]) -> Array:
    return in_dtype(to_numpy(read_values(planned.entry, *stretch)), dtype)
