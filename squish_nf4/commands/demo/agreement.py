"""How close the embeddings of the NF4 model are to those of the dense one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How close the NF4 embeddings are to the dense ones. Sentences 2k and 2k + 1 mean the same.

    Attributes:
        cosine: (sentences,) between the two embeddings of a sentence.
        dense, nf4: (sentences, sentences) similarities of the sentences among each other, within each model.
    """

    cosine: Floats
    dense: Floats
    nf4: Floats

    @property
    def mean_cosine(self) -> float:
        return float(self.cosine.mean())

    @property
    def worst_cosine(self) -> float:
        return float(self.cosine.min())

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of the two models' similarities, over all pairs of two sentences."""
        pairs = np.triu_indices(len(self.cosine), 1)
        return float(np.corrcoef(ranks(self.dense[pairs]), ranks(self.nf4[pairs]))[0, 1])

    @staticmethod
    def partners_found(similarities: Floats) -> int:
        """How many sentences have their paraphrase as the most similar other sentence."""
        others = similarities - 3 * np.eye(len(similarities))  # a cosine is at least -1
        return int((others.argmax(1) == np.arange(len(others)) ^ 1).sum())


def agreement_of(dense: Floats, nf4: Floats) -> Agreement:
    """Compare two models' embeddings of the same sentences: (sentences, width), each row of length one."""
    return Agreement((dense * nf4).sum(1), dense @ dense.T, nf4 @ nf4.T)


def ranks(values: Floats) -> Floats:
    """The rank of each value, 1 for the smallest; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2)[index], dtype=np.float64)
