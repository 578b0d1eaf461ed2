"""The pictures of inspect's page: SVG in the colours of the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from squish_nf4 import _C
from squish_nf4.checkpoint.audit.inspection import Inspection
from squish_nf4.checkpoint.audit.measure import ERROR_EDGES
from squish_nf4.commands.drawing import GAUSSIAN_ERROR, quiet_matplotlib
from squish_nf4.commands.terminal import size

# Stand-ins for the page's custom properties: matplotlib wants colours, and writes each as it is given.
COLOURS = {"#010101": "--ink", "#020202": "--muted", "#030303": "--faint", "#040404": "--accent", "#050505": "--warm"}
INK, MUTED, FAINT, ACCENT, WARM = COLOURS

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


LARGEST_ERROR = 1e100  # that is drawn; no axis takes numbers near the end of the range, nor NaN

Draw = Callable[[Any, Inspection], None]


def draw_all(report: Inspection) -> dict[str, str]:
    """{title: SVG}, as far as there is something to compare."""
    plots: dict[str, Draw] = {}
    if len(report.owned) > 1:
        plots["Where the bytes are"] = draw_bytes
    if report.in_nf4:
        plots["How often each level is used"] = draw_levels
    if len(report.in_nf4) > 1:
        plots["Relative RMS error of each tensor"] = draw_errors
    if report.in_nf4:
        plots[f"Relative error of the groups, {report.groups}"] = draw_groups
    return {title: as_svg(title, draw, report) for title, draw in plots.items()}


def as_svg(title: str, draw: Draw, report: Inspection) -> str:
    """One plot as SVG whose colours are the page's custom properties."""
    matplotlib, Figure = quiet_matplotlib()  # noqa: N806
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):  # the same page for the same numbers
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        draw(figure.add_subplot(), report)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def draw_bytes(axes: Any, report: Inspection) -> None:
    """Draw a bar for what is in NF4, and one for each dtype of the kept."""
    groups: defaultdict[str, int] = defaultdict(int)
    for tensor in report.owned:
        groups["NF4" if tensor.nf4 else f"kept, {tensor.stored_as}"] += tensor.nbytes
    ranked = sorted(groups.items(), key=lambda group: -group[1])
    names, sizes = [name for name, _ in ranked], np.array([n for _, n in ranked], np.float64)
    colours = [ACCENT if name == "NF4" else MUTED for name in names]
    axes.barh(names, sizes, color=colours, height=0.62)
    for y, n in enumerate(sizes):
        axes.text(n + sizes.max() * 0.015, y, size(n), va="center", color=INK)
    axes.set_xlim(0, max(1.0, sizes.max()) * 1.2)
    axes.set_ylim(max(len(names), 4) - 0.3, -0.7)  # the largest on top, bars not higher where they are few
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_levels(axes: Any, report: Inspection) -> None:
    """Draw a bar at the place of each level, so that one sees how close they lie to each other."""
    shares = np.array(report.indices) / max(1, sum(report.indices))
    axes.grid(axis="y")
    axes.bar(_C.codebook(), 100 * shares, width=0.055, color=ACCENT)
    draw_reference(axes, 100 / 16, "all\nalike")
    axes.set_xlabel("level, times the scale of its group")
    in_percent(axes)


def draw_errors(axes: Any, report: Inspection) -> None:
    """Draw a dot for each tensor, and a line where normal weights would be."""
    errors = [e if (e := numbers.relative_rms) < LARGEST_ERROR else math.nan for _, numbers in report.in_nf4]
    axes.grid(axis="y")
    axes.scatter(range(1, len(errors) + 1), errors, s=16, color=ACCENT, zorder=3)
    sizes = {numbers.group_size for _, numbers in report.in_nf4}
    expected = GAUSSIAN_ERROR.get(next(iter(sizes))) if len(sizes) == 1 else None
    if expected is not None:
        draw_reference(axes, expected, "Gaussian\nweights")
    known = [error for error in [*errors, expected or math.nan] if math.isfinite(error)] or [0.0]
    low, high = min(known), max(known)
    margin = 0.25 * (high - low) or 0.01
    axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.set_xlim(0.2, len(errors) + 0.8)
    axes.set_xlabel("tensors in NF4, in the order of the file")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_groups(axes: Any, report: Inspection) -> None:
    """Draw how often each relative error occurs within a group, over all tensors."""
    counts = np.sum([numbers.group_errors for _, numbers in report.in_nf4], axis=0)
    shares = counts / max(1, counts.sum())
    middles = (ERROR_EDGES[:-1] + ERROR_EDGES[1:]) / 2
    axes.grid(axis="y")
    axes.bar(middles, 100 * shares, width=np.diff(ERROR_EDGES) * 0.86, color=ACCENT)
    used = np.flatnonzero(counts) if counts.any() else [0]
    axes.set_xlim(ERROR_EDGES[max(0, used[0] - 2)], ERROR_EDGES[min(len(counts), used[-1] + 3)])
    axes.set_xlabel("relative error within a group" + (", 0.25 and beyond in the last bar" if counts[-1] else ""))
    in_percent(axes)


def draw_reference(axes: Any, y: float, text: str) -> None:
    """Draw a line to compare with, and write what it is right of the axes."""
    axes.axhline(y, color=WARM, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), color=WARM, va="center")


def in_percent(axes: Any) -> None:
    axes.yaxis.get_major_locator().set_params(nbins=5, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
