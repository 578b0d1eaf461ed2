"""The records as pictures: time over M, the share of the machine's limit, the roofline, and growth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.measures import best_path, groups
from benchmarks.records import COLD, LIMIT, OURS, Record, matching
from squish_nf4.commands.drawing import GREY, STYLE, quiet_matplotlib

# Okabe and Ito's colours, which can be told apart with every kind of colour vision.
COLOURS = {
    "squish_nf4": "#0072B2",
    "dense torch": "#222222",
    "bitsandbytes": "#D55E00",
    "int4pack (torch)": "#009E73",
    "ggml IQ4_NL": "#CC79A7",
    "torchao NF4": "#E69F00",
}
MARKERS = {"bfloat16": "o", "float16": "^", "float32": "s"}


def draw(records: Sequence[Record], folder: Path) -> list[tuple[str, str]]:
    """Every picture for which there are records: (file name, what it shows)."""
    matplotlib, Figure = quiet_matplotlib()  # noqa: N806
    pictures = (
        ("time-over-m.png", "Time of a product over the number of activations", time_over_m),
        ("limits.png", "Speed as a share of the machine's limit", shares_of_limits),
        ("roofline.png", "Arithmetic done in a second over arithmetic for each byte of weight", roofline),
        ("growth.png", "Time over rows, columns, activations and threads", growth),
    )
    drawn = []
    for name, text, picture in pictures:
        with matplotlib.rc_context(STYLE):
            figure = Figure(dpi=120, facecolor="white", layout="constrained")
            if picture(figure, records):
                figure.savefig(folder / name)
                drawn.append((name, text))
    return drawn


def _largest(records: Sequence[Record]) -> list[Record]:
    """Cold products on the best path with the most threads, of the shape that most of the records have."""
    found = matching(records, suite="linear", place=COLD, isa=best_path(records))
    if not found:
        return []
    shapes = [(record.case.n, record.case.d) for record in found]
    n, d = max(shapes, key=shapes.count)
    return matching(found, n=n, d=d, threads=max(record.case.threads for record in found))


def time_over_m(figure: Any, records: Sequence[Record]) -> bool:
    found = _largest(records)
    dtypes = sorted({record.case.dtype for record in found})
    if not found:
        return False
    figure.set_size_inches(5 * len(dtypes), 4.6)
    for axes, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes, strict=True):
        for series in groups(matching(found, dtype=dtype), without="m"):
            _line(axes, series, "m", series[0].candidate)
        case = found[0].case
        axes.set_title(f"{dtype}, {case.n} x {case.d}, cold, {case.threads} threads")
        axes.set_xlabel("activations M")
        axes.set_ylabel("milliseconds")
        axes.legend(fontsize=7, frameon=False)
    return True


def _line(axes: Any, series: Sequence[Record], along: str, label: str, colour: str | None = None) -> None:
    ordered = sorted(series, key=lambda record: record.field(along))
    limit = ordered[0].role == LIMIT
    axes.loglog(
        [record.field(along) for record in ordered],
        [record.ms for record in ordered],
        color=colour or (GREY if limit else COLOURS.get(ordered[0].candidate, "#56B4E9")),
        linestyle="--" if limit else "-",
        linewidth=2 if ordered[0].role == OURS else 1,
        marker=".",
        label=label,
    )


def shares_of_limits(figure: Any, records: Sequence[Record]) -> bool:
    bars = []
    for record in matching(records, role=OURS, place=COLD, suite=("codec", "linear")):
        if record.case.suite == "linear" and (record.case.m != 1 or record.case not in _main_cases(records)):
            continue
        limits = {other.candidate for other in matching(records, case=record.case, role=LIMIT, isa=record.isa)}
        shares = [1 / record.ratios[name] for name in limits if name in record.ratios and _belongs(record, name)]
        if shares:
            bars.append((_bar_name(record), min(shares)))
    if not bars:
        return False
    figure.set_size_inches(9, 0.9 + 0.24 * len(bars))
    axes = figure.subplots()
    axes.barh([name for name, _ in bars], [share for _, share in bars], color=COLOURS["squish_nf4"], height=0.7)
    for place, (_, share) in enumerate(bars):
        axes.text(share, place, f" {share:.2f}", va="center", size=7)
    axes.axvline(1, color=GREY, linestyle="--")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title("Speed as a share of the limit loop's, cold")
    return True


def _main_cases(records: Sequence[Record]) -> set[Any]:
    """The cases of the shape that most of the products have."""
    found = matching(records, suite="linear")
    shapes = [(record.case.n, record.case.d) for record in found]
    n, d = max(shapes, key=shapes.count)
    return {record.case for record in matching(found, n=n, d=d)}


def _belongs(record: Record, limit: str) -> bool:
    """The .out form is compared with a store into the same memory, the fresh one with a store into fresh memory."""
    if record.case.what != "dequantize":
        return True
    return ("fresh" in limit) == (not record.candidate.endswith(".out"))


def _bar_name(record: Record) -> str:
    case = record.case
    form = " .out" if record.candidate.endswith(".out") else ""
    m = f" M = {case.m}" if case.m else ""
    return f"{case.what}{form}{m} {case.dtype}, {case.threads} thread{'s' if case.threads > 1 else ''}, {record.isa}"


def roofline(figure: Any, records: Sequence[Record]) -> bool:
    """The roofs are measured: the read loop's bandwidth, and the most arithmetic that dense torch did in a second."""
    found = _largest(records)
    reads = [record for record in found if record.role == LIMIT and record.case.m == 1]
    dense = matching(found, candidate="dense torch")
    if not reads or not dense:
        return False
    figure.set_size_inches(7.5, 5)
    axes = figure.subplots()
    bandwidth = max(_bytes(record) / record.ms for record in reads) * 1e3
    most = max(record.case.m for record in found)
    for dtype in sorted({record.case.dtype for record in dense}):
        roof = max(_flops(record) / record.ms for record in matching(dense, dtype=dtype)) * 1e3
        x = [_flops(reads[0]) / _bytes(reads[0]) * m for m in (0.5, *_powers(2 * most))]
        axes.loglog(x, [min(roof, value * bandwidth) / 1e9 for value in x], color=GREY, linewidth=1)
        axes.text(x[-1], roof / 1e9, f"dense {dtype}", ha="right", va="bottom", size=7, color="#666666")
        ours = sorted(matching(found, role=OURS, dtype=dtype), key=lambda record: record.case.m)
        intensity = [_flops(record) / _bytes(record) for record in ours]
        rates = [_flops(record) / record.ms * 1e3 / 1e9 for record in ours]
        axes.loglog(intensity, rates, marker=MARKERS[dtype], markersize=5, label=f"squish_nf4 {dtype}")
    axes.set_xlabel("operations for each byte of packed weight and scales")
    axes.set_ylabel("10^9 operations a second")
    axes.set_title(f"Roofline: {bandwidth / 1e9:.0f} GB/s read, and the best of dense torch")
    axes.legend(fontsize=8, frameon=False)
    return True


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def _flops(record: Record) -> float:
    return 2.0 * record.case.n * record.case.d * max(record.case.m, 1)


def _bytes(record: Record) -> float:
    case = record.case
    return case.n * case.d * (0.5 + 4 / case.group_size)


def growth(figure: Any, records: Sequence[Record]) -> bool:
    sweeps = [(name, matching(records, suite=f"growth with {name}")) for name in ("n", "d", "M", "threads")]
    if not any(found for _, found in sweeps):
        return False
    figure.set_size_inches(18, 4.6)
    for axes, (name, found) in zip(figure.subplots(1, len(sweeps)), sweeps, strict=True):
        computing = [record for record in found if record.role != LIMIT]
        for colour, series in zip(cycle(COLOURS.values()), groups(computing, without=name.lower())):
            case = series[0].case
            m = f", M = {case.m}" if name == "threads" else ""
            _line(axes, series, name.lower(), f"{case.what}{m} {case.dtype}, {series[0].candidate}", colour)
        axes.set_xticks(sorted({record.field(name.lower()) for record in computing if _is_power(record, name)}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_title(f"over {name}")
        axes.set_ylabel("milliseconds")
        axes.legend(fontsize=6, frameon=False)
    return True


def _is_power(record: Record, name: str) -> bool:
    value: int = record.field(name.lower())
    return name != "M" or value & (value - 1) == 0
