"""Tensors that a checkpoint holds twice: an embedding and the output layer that shares its weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from squish_nf4.checkpoint.source.shards import Entry, read_values

SAMPLE = 1024  # values looked at before a tensor is read as a whole
STEP = 2**18  # values read at a time


def find_tied(entries: Sequence[Entry]) -> dict[str, str]:
    """{name: the first tensor with the same values} for matrices of one dtype and shape that are equal in every byte.

    Constant ones are not tied, nor are vectors: they are equal because nobody trained them. No tensor is read more than
    once, and few are read at all.
    """
    matrices = [entry for entry in entries if len(entry.shape) >= 2 and entry.numel]
    tied: dict[str, str] = {}
    for alike in shared(matrices, lambda entry: (entry.dtype, entry.shape)):
        for similar in shared(alike, sample):
            for owner, *others in shared(similar, digest_unless_constant):
                tied |= {entry.name: owner.name for entry in others}
    return tied


def shared(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    """The entries of one key, for each key that is not None and that two or more have."""
    groups: defaultdict[Hashable, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return [group for found, group in groups.items() if found is not None and len(group) > 1]


def sample(entry: Entry) -> bytes:
    """The bytes of a stretch in the middle: the first rows of two embeddings may be equal, being padding."""
    count = min(SAMPLE, entry.numel)
    return raw(entry, (entry.numel - count) // 2, count).numpy().tobytes()


def digest_unless_constant(entry: Entry) -> bytes | None:
    """The sha256 of all bytes; None if every value is the same."""
    first = raw(entry, 0, 1)
    sha256 = hashlib.sha256()
    constant = True
    for start in range(0, entry.numel, STEP):
        values = raw(entry, start, min(STEP, entry.numel - start))
        sha256.update(values.numpy().data)
        constant = constant and bool((values.view(-1, len(first)) == first).all())
    return None if constant else sha256.digest()


def raw(entry: Entry, start: int, count: int) -> torch.Tensor:
    """The bytes of some values: NaN equals itself, and -0.0 is not 0.0."""
    return read_values(entry, start, count).view(torch.uint8)
