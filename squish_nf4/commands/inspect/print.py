"""What ``squish-nf4 inspect`` prints: a table for people, or JSON for programs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from squish_nf4.checkpoint.audit.inspection import Inspected, Inspection
from squish_nf4.checkpoint.audit.measure import ERROR_EDGES, Nf4Numbers, entropy_of
from squish_nf4.checkpoint.messages import shown
from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import count, duration, size

BARS = "▁▂▃▄▅▆▇█"
WHERE_FROM = {
    "measured": "measured against the source",
    "recorded": "as the converter recorded them",
    "estimated": "estimated from the cells of the levels; --source measures them",
}


def print_inspection(report: Inspection) -> None:
    """Print the tables, and a summary of a few lines."""
    out = terminal.console()
    if report.in_nf4:
        out.print(nf4_table(report, out.width, bars="utf" in out.encoding.lower()))
        out.print(worst_groups(report))
    if len(report.in_nf4) < len(report.owned):
        out.print(kept_table(report))
    for line in summary(report):
        out.print(f"  {line}", soft_wrap=True)


def nf4_table(report: Inspection, width: int, bars: bool) -> Table:
    """A table of every tensor in NF4, without the columns that do not fit beside a usual name; JSON has all."""
    columns: dict[str, Callable[[Inspected, Nf4Numbers], str]] = {
        "group": lambda tensor, numbers: "tied" if tensor.tied_to else str(numbers.group_size),
        "bits": lambda tensor, _: f"{tensor.bits_per_weight:.2f}",
        "rel. RMS": lambda _, numbers: f"{'~' if numbers.basis == 'estimated' else ''}{numbers.relative_rms:.4f}",
        "SNR, dB": lambda _, numbers: decibels(numbers).removesuffix(" dB"),
    }
    if "measured" in report.bases and width >= 90:
        columns["cosine"] = lambda _, numbers: "" if numbers.cosine is None else f"{numbers.cosine:.5f}"
    if bars and width >= 110:
        columns["levels, -1 to 1"] = lambda _, numbers: sparkline(numbers.indices)
    if width >= 130:
        columns["shape"] = lambda tensor, _: shape_of(tensor.shape)
    table = terminal.plain_table("in NF4", *columns)
    for tensor in report.tensors:
        if tensor.nf4:
            table.add_row(terminal.name(tensor.name), *(text(tensor, tensor.nf4) for text in columns.values()))
    return table


def kept_table(report: Inspection) -> Table:
    """A table of the kept tensors by dtype; the page and JSON list every one."""
    groups: defaultdict[str, list[Inspected]] = defaultdict(list)
    for tensor in report.owned:
        if not tensor.nf4:
            groups[tensor.stored_as].append(tensor)
    table = terminal.plain_table("kept as", "tensors", "bytes", "which")
    table.columns[3].justify = "left"
    for dtype, tensors in groups.items():
        ranked = sorted(tensors, key=lambda tensor: -tensor.nbytes)
        names = ", ".join(shown(tensor.name) for tensor in ranked[:2])
        more = f" and {len(ranked) - 2} more" if len(ranked) > 2 else ""
        table.add_row(dtype, str(len(ranked)), size(sum(t.nbytes for t in ranked)), terminal.escape(names + more))
    return table


def shape_of(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def decibels(numbers: Nf4Numbers) -> str:
    return f"{numbers.snr:.1f} dB" if numbers.relative_rms else "exact"


def sparkline(counts: Sequence[int]) -> str:
    """Characters as bars, one a level, from -1 to 1."""
    most = max(counts) or 1
    return "".join(BARS[round((len(BARS) - 1) * n / most)] for n in counts)


def worst_groups(report: Inspection) -> Table:
    """A table: the worst group of each of the five tensors with the largest errors, or five of the only tensor."""
    ranked = sorted(report.in_nf4, key=lambda pair: -pair[1].relative_rms)[:5]
    table = terminal.plain_table(
        f"worst group, {report.groups}", "row", "columns", "scale", "rel. RMS", "share of error"
    )
    for tensor, numbers in ranked:
        for group in numbers.worst if len(ranked) == 1 else numbers.worst[:1]:
            columns = f"{group.columns[0]}-{group.columns[1]}"
            cells = [str(group.row), columns, f"{group.scale:.3g}", f"{group.relative_rms:.4f}", f"{group.share:.2%}"]
            table.add_row(terminal.name(tensor.name), *cells)
    return table


def summary(report: Inspection) -> list[str]:
    weights = f"{report.weights:,} weights" if report.weights != 1 else "1 weight"
    total = f"{report.bits_per_weight:.2f} bits each"
    lines = [f"{count(len(report.owned), 'tensor')}, {weights}, {size(report.nbytes)}, {total}"]
    if report.in_nf4:
        entropy = entropy_of(report.indices)
        lines.append(
            f"{len(report.in_nf4)} in NF4: {report.nf4_bits_per_weight:.2f} bits a weight, relative RMS error "
            f"{report.relative_rms:.4f}, {entropy:.2f} of 4 bits used by the indices"
        )
        lines.append(f"[dim]errors {'; '.join(WHERE_FROM[basis] for basis in report.bases)}[/]")
    lines.append(f"[dim]looked at in {duration(report.seconds)}[/]")
    return lines


def print_json(report: Inspection) -> None:
    terminal.console().out(json.dumps(as_json(report), indent=2, allow_nan=False))


def as_json(report: Inspection) -> dict[str, Any]:
    """The report in plain numbers, lists and dicts; what is no finite number (an unknown cosine too) is None."""
    tensors = [
        {
            **asdict(tensor),
            "nf4": None if tensor.nf4 is None else {**asdict(tensor.nf4), "snr_db": tensor.nf4.snr},
        }
        for tensor in report.tensors
    ]
    table = {
        "path": str(report.path),
        "source": None if report.source is None else str(report.source),
        "weights": report.weights,
        "bytes": report.nbytes,
        "bits_per_weight": report.bits_per_weight,
        "nf4_bits_per_weight": report.nf4_bits_per_weight,
        "relative_rms": report.relative_rms,
        "errors": report.bases,
        "indices": report.indices,
        "group_error_edges": [round(float(edge), 6) for edge in ERROR_EDGES],
        "tensors": tensors,
    }
    return {name: finite(value) for name, value in table.items()}


def finite(value: Any) -> Any:
    """A value for JSON, with None in the place of every NaN and infinity."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
