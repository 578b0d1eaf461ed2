"""Tensors that a checkpoint holds twice: an embedding and the output layer that shares its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from squish_nf4.checkpoint.source.shards import Entry, read_values

SAMPLE = 1024  # values looked at before two tensors are compared as a whole
STEP = 2**18  # values compared at a time


def find_tied(entries: Sequence[Entry]) -> dict[str, str]:
    """{name: the first tensor with the same values} for matrices of one dtype and shape that are equal in every byte.

    Constant ones are not tied, nor are vectors: they are equal because nobody trained them.
    """
    alike: defaultdict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if len(entry.shape) >= 2 and entry.numel:
            alike[entry.dtype, entry.shape].append(entry)
    tied: dict[str, str] = {}
    for group in alike.values():
        by_sample: defaultdict[bytes, list[Entry]] = defaultdict(list)
        for entry in group if len(group) > 1 else ():
            owners = by_sample[sample(entry)]
            owner = next((owner for owner in owners if equal_and_not_constant(owner, entry)), None)
            if owner is None:
                owners.append(entry)
            else:
                tied[entry.name] = owner.name
    return tied


def sample(entry: Entry) -> bytes:
    """The bytes of a stretch in the middle: the first rows of two embeddings may be equal, being padding."""
    count = min(SAMPLE, entry.numel)
    return raw(entry, (entry.numel - count) // 2, count).numpy().tobytes()


def equal_and_not_constant(a: Entry, b: Entry) -> bool:
    first = raw(a, 0, 1)
    constant = True
    for start in range(0, a.numel, STEP):
        count = min(STEP, a.numel - start)
        ours = raw(a, start, count)
        if not torch.equal(ours, raw(b, start, count)):
            return False
        constant = constant and bool((ours.view(-1, len(first)) == first).all())
    return not constant


def raw(entry: Entry, start: int, count: int) -> torch.Tensor:
    """The bytes of some values: NaN equals itself, and -0.0 is not 0.0."""
    return read_values(entry, start, count).view(torch.uint8)
