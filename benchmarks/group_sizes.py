"""What a group size costs in bits and in error: the table of docs/settings.md, on standard output.

The error is ||W - decoded|| / ||W||: of Gaussian weights, and of all encoder weights of all-MiniLM-L6-v2. The cosine is
that between a sentence's embedding by the dense model and by the NF4 one, the mean over the sentences of the demo.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

import squish_nf4
from squish_nf4.commands.demo.agreement import agreement_of
from squish_nf4.commands.demo.model import encode, load_model
from squish_nf4.commands.demo.sentences import SENTENCES
from squish_nf4.layout import bits_per_weight
from squish_nf4.ops import relative_error, survey_nf4

GROUP_SIZES = (8, 16, 32, 64, 128, 384)  # 384: a whole row of most of the model's layers


def gaussian_error(group_size: int) -> float:
    w = torch.randn(4096, 384 * 8, generator=torch.Generator().manual_seed(1))
    survey = survey_nf4(w, *squish_nf4.quantize_nf4(w, group_size), group_size)
    return relative_error(float(survey.squared_error.sum()), float(survey.square.sum()))


def main(group_sizes: Sequence[int] = GROUP_SIZES, sentences: Sequence[str] = SENTENCES) -> None:
    dense = load_model()
    expected = encode(dense, sentences)
    encoder = dense[0].model.encoder
    print("| group size | bits a weight | error, Gaussian | error, MiniLM | cosine, MiniLM |")
    print("|---" * 5 + "|")
    for group_size in group_sizes:
        model = copy.deepcopy(dense)
        report = squish_nf4.quantize_model(model[0].model.encoder, group_size=group_size)
        squares = [float(encoder.get_submodule(layer.name).weight.detach().square().sum()) for layer in report.layers]
        errors = [layer.relative_rms_error or 0.0 for layer in report.layers]
        lost = relative_error(sum(e**2 * n for e, n in zip(errors, squares, strict=True)), sum(squares))
        cosine = agreement_of(expected, encode(model, sentences)).mean_cosine
        bits, gaussian = bits_per_weight(group_size, group_size), gaussian_error(group_size)
        print(f"| {group_size} | {bits:.2f} | {gaussian:.4f} | {lost:.4f} | {cosine:.4f} |")


if __name__ == "__main__":
    main()
