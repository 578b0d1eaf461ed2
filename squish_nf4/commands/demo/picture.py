"""The demo's picture: what each layer of the encoder lost and saved, and what that did to the similarities."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squish_nf4.commands.drawing import BLUE, FAINT, GAUSSIAN_ERROR, GREY, ORANGE, STYLE, quiet_matplotlib
from squish_nf4.replace import written_beside

if TYPE_CHECKING:
    from squish_nf4.commands.demo.agreement import Agreement
    from squish_nf4.model.report import LayerReport, QuantizeReport

ROLES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "up",
    "output.dense": "down",
}


def draw(path: Path, quantized: QuantizeReport, agreement: Agreement) -> Path:
    """Write a PNG of 2100 x 1350 pixels; returns its path."""
    matplotlib, Figure = quiet_matplotlib()  # noqa: N806
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 9), dpi=150, facecolor="white")
        grid = figure.add_gridspec(1, 3, width_ratios=(1, 1, 2.15), left=0.115, right=0.985, top=0.82, bottom=0.075)
        grid.update(wspace=0.14)
        sizes = figure.add_subplot(grid[0])
        errors = figure.add_subplot(grid[1], sharey=sizes)
        similarities = figure.add_subplot(grid[2])
        draw_head(figure, quantized, agreement)
        draw_sizes(sizes, quantized.layers)
        draw_errors(errors, quantized.layers)
        draw_similarities(similarities, agreement)
        similarities.set_anchor("NE")
        with written_beside(path) as file:
            figure.savefig(file)
    return path


def draw_head(figure: Any, quantized: QuantizeReport, agreement: Agreement) -> None:
    before, after = quantized.bytes_before / 1e6, quantized.bytes_after / 1e6
    figure.text(0.02, 0.945, f"MiniLM's encoder in NF4: {before:.1f} MB become {after:.1f} MB", size=18, weight="bold")
    figure.text(
        0.02,
        0.91,
        f"The embeddings of {len(agreement.cosine)} sentences keep a mean cosine of {agreement.mean_cosine:.3f} "
        f"to the dense ones (worst {agreement.worst_cosine:.3f}); their similarities keep their order "
        f"(rank correlation {agreement.rank_correlation:.3f}).",
        size=11,
        color="#555555",
    )


def positions(layers: tuple[LayerReport, ...]) -> Any:
    """Where each layer's bar is: from the top down, with a gap between the blocks of the encoder."""
    blocks = [block_of(layer.name) for layer in layers]
    begins = np.array([False] + [above != below for above, below in pairwise(blocks)])
    return np.arange(len(layers)) + 0.8 * begins.cumsum()


def block_of(name: str) -> str:
    """The number of a layer's block: "3" of "layer.3.attention.self.query"."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def role_of(name: str) -> str:
    """What a layer does in its block: "query" for "layer.3.attention.self.query"."""
    role = name.split(f".{block_of(name)}.")[-1]
    return ROLES.get(role, role)


def draw_sizes(axes: Any, layers: tuple[LayerReport, ...]) -> None:
    y = positions(layers)
    weights = np.array([layer.shape[0] * layer.shape[1] for layer in layers])
    nf4 = weights * np.array([layer.bits_per_weight for layer in layers]) / 8e6
    axes.barh(y, weights * 4e-6, height=0.72, color=FAINT)
    axes.barh(y, nf4, height=0.72, color=BLUE)
    axes.set_title("Megabytes of each layer")
    axes.text(weights.max() * 4e-6, y[4], "float32 ", ha="right", va="center", color="#666666", size=8)
    axes.text(nf4.max() + 0.03, y[4], "NF4", ha="left", va="center", color=BLUE, size=8, weight="bold")
    axes.set_yticks(y, [role_of(layer.name) for layer in layers], size=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(y[-1] + 0.7, y[0] - 0.7)
    axes.set_xlim(0, None)
    blocks = [block_of(layer.name) for layer in layers]
    for block in dict.fromkeys(blocks):
        rows = [row for row, other in zip(y, blocks, strict=True) if other == block]
        axes.annotate(
            f"block {int(block) + 1}",
            (-0.42, float(np.mean(rows))),
            xycoords=axes.get_yaxis_transform(),
            rotation=90,
            ha="center",
            va="center",
            weight="bold",
            size=8,
        )


def draw_errors(axes: Any, layers: tuple[LayerReport, ...]) -> None:
    y = positions(layers)
    errors = np.array([layer.relative_rms_error or 0.0 for layer in layers])
    axes.hlines(y, 0, 0.98, transform=axes.get_yaxis_transform(), color=FAINT, linewidth=0.6, zorder=1)
    axes.scatter(errors, y, s=30, color=BLUE, zorder=3)
    axes.set_title("Relative error of its weights")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
    expected = GAUSSIAN_ERROR.get(layers[0].group_size)
    if expected is not None:
        axes.axvline(expected, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        label = {"color": "#666666", "size": 8, "va": "bottom", "ha": "center"}
        axes.text(expected, 1.005, "Gaussian weights", transform=axes.get_xaxis_transform(), **label)
    low, high = min(errors.min(), expected or 1.0), errors.max()
    axes.set_xlim(low - 0.2 * (high - low), high + 0.2 * (high - low))


def draw_similarities(axes: Any, agreement: Agreement) -> None:
    row, column = np.triu_indices(len(agreement.cosine), 1)
    paraphrase = row // 2 == column // 2
    dense, nf4 = agreement.dense[row, column], agreement.nf4[row, column]
    low, high = float(min(dense.min(), nf4.min())) - 0.04, 1.0
    axes.plot((low, high), (low, high), color=GREY, linewidth=1, zorder=1)
    axes.scatter(dense[~paraphrase], nf4[~paraphrase], s=11, color=BLUE, alpha=0.35, linewidths=0, zorder=2)
    axes.scatter(dense[paraphrase], nf4[paraphrase], s=34, color=ORANGE, edgecolors="white", linewidths=0.6, zorder=3)
    axes.set_title("Similarity of two sentences: dense and NF4")
    axes.set_xlabel("cosine of their embeddings, dense model")
    axes.set_ylabel("cosine of their embeddings, NF4 model")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    beside = {"weight": "bold"}
    x, y = np.median(dense[paraphrase]), np.median(nf4[paraphrase])
    axes.text(x - 0.09, y + 0.06, "paraphrases", color=ORANGE, ha="right", va="bottom", **beside)
    x, y = np.median(dense[~paraphrase]), np.median(nf4[~paraphrase])
    axes.text(x + 0.15, y - 0.09, "all other pairs", color=BLUE, ha="left", va="top", **beside)
