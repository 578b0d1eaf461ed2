"""What a group size costs in bits and in error: the table of docs/settings.md, on standard output.

The error is ||W - decoded|| / ||W||: of Gaussian weights, and of all encoder weights of all-MiniLM-L6-v2. The cosine is
that between a sentence's embedding by the dense model and by the NF4 one, the mean over the sentences of the demo.
"""

from __future__ import annotations

import copy
from math import sqrt

import torch

import squish_nf4
from squish_nf4.commands.demo import run as demo
from squish_nf4.commands.demo.sentences import SENTENCES

GROUP_SIZES = (8, 16, 32, 64, 128, 384)  # 384: a whole row of most of the model's layers


def gaussian_error(group_size: int) -> float:
    w = torch.randn(4096, 384 * 8, generator=torch.Generator().manual_seed(1))
    decoded = squish_nf4.dequantize_nf4(*squish_nf4.quantize_nf4(w, group_size), group_size)
    return float((w - decoded).norm() / w.norm())


def main() -> None:
    dense = demo.load_model()
    expected = demo.encode(dense, SENTENCES)
    encoder = dense[0].model.encoder
    print("| group size | bits a weight | error, Gaussian | error, MiniLM | cosine, MiniLM |")
    print("|---" * 5 + "|")
    for group_size in GROUP_SIZES:
        model = copy.deepcopy(dense)
        report = squish_nf4.quantize_model(model[0].model.encoder, group_size=group_size)
        norms = [float(encoder.get_submodule(layer.name).weight.detach().norm()) for layer in report.layers]
        errors = [layer.relative_rms_error or 0.0 for layer in report.layers]
        lost = sqrt(sum((e * n) ** 2 for e, n in zip(errors, norms, strict=True)) / sum(n**2 for n in norms))
        cosine = demo.compare(expected, demo.encode(model, SENTENCES)).mean_cosine
        bits = 4 + 32 / group_size
        print(f"| {group_size} | {bits:.2f} | {gaussian_error(group_size):.4f} | {lost:.4f} | {cosine:.4f} |")


if __name__ == "__main__":
    main()
