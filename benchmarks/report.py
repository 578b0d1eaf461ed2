"""The records as a page, docs/benchmarks/README.md: the goals first, then the plots, and tables for each suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.goals import GOALS, Goal
from benchmarks.measures import best_path
from benchmarks.peers import ALL
from benchmarks.records import LIMIT, OURS, Record

TABLE = "README.md"
REACHED, MISSED, UNKNOWN = "reached", "**missed**", "not measured"

# suite -> (fields that have a table each, the field of its columns)
TABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "codec": (("what", "n", "d", "place", "threads", "isa"), "dtype"),
    "linear": (("dtype", "n", "d", "group_size", "place", "threads", "isa"), "m"),
    "backward": (("dtype", "n", "d", "threads", "isa"), "m"),
    "overhead": (("what", "isa"), "dtype"),
    "model": (("what", "threads", "isa"), "dtype"),
    "conversion": (("what", "threads", "isa"), "dtype"),
    "checkpoint": (("what", "threads", "isa"), "dtype"),
    "imports": (("what",), "place"),
}
TITLES = {
    "codec": "quantize and dequantize",
    "linear": "linear",
    "backward": "The gradient of x",
    "overhead": "What a call costs",
    "model": "A whole model",
    "conversion": "quantize_model",
    "checkpoint": "squish-nf4 convert",
    "imports": "Import",
}
HEAD = """# Benchmarks

Written by `make bench`; every figure is a record in [records.jsonl](records.jsonl). Times are medians. A ratio is the
median of the ratios within a round, in which the candidates take turns in one process, and was not computed from the
two medians. What a candidate computes was compared with the definition before it was timed. *Cold* rotates over more
copies of the weights than the caches hold, and each candidate has its own; *hot* uses one copy. The limits are loops
(`benchmarks/limits.cpp`) over the same number of bytes (those of the codec leave the scales out), in the same rounds,
on the same threads; where there are two, the faster counts.
"""
GOALS_HEAD = """What is measured is a speed, relative to that of what the goal names, unless it says error, time or
call. The value is that of the worst case: of all dtypes, M, threads and places that the goal does not fix.
"""
CELLS = """A cell is a time in milliseconds (of a mere call: microseconds), and in parentheses that time over the one of
the first row. The fastest is bold. The error is relative, and the largest of the row: of a product, to the float64
product of the weights as that candidate stores them; of a peer's codec, to the weights that it encoded. The error 0
means equal to the definition in every bit.
"""


def write(records: Sequence[Record], folder: Path) -> None:
    """The page and its plots, into the folder."""
    pictures = plots.draw(records, folder)
    (folder / TABLE).write_text(page(records, pictures))


def page(records: Sequence[Record], pictures: Sequence[tuple[str, str]] = ()) -> str:
    parts = [HEAD, where_measured(records), "## Goals\n", GOALS_HEAD, goal_table(records)]
    parts += [f"![{text}]({name})\n" for name, text in pictures]
    parts += ["## Who was compared\n", peer_list(records), "## How to read the tables\n", CELLS]
    for suite in TABLES:
        found = [record for record in records if record.case.suite == suite]
        if found:
            parts += [f"## {TITLES[suite]}\n", *suite_tables(suite, found)]
    return "\n".join(parts)


def where_measured(records: Sequence[Record]) -> str:
    machines = sorted({record.machine for record in records})
    dates = sorted({record.date for record in records})
    versions = sorted({f"{name} {version}" for record in records for name, version in record.versions.items()})
    when = dates[0] if dates[:1] == dates[-1:] else f"{dates[0]} to {dates[-1]}"
    return f"Measured {when} on {'; '.join(machines)}; best CPU path {best_path(records)}; {', '.join(versions)}.\n"


def peer_list(records: Sequence[Record]) -> str:
    """What each peer computes, where that is not what this library does."""
    present = {record.candidate for record in records}
    lines = [f"- **{peer.name}**: {peer.note}." for peer in ALL if peer.name in present]
    absent = [peer.name for peer in ALL if peer.name not in present]
    return "\n".join(lines + [f"- Not there in this run: {', '.join(absent)}."] * bool(absent)) + "\n"


def goal_table(records: Sequence[Record]) -> str:
    lines = ["| goal | bound | measured | | worst case |", "|---|---|---|---|---|"]
    lines += [goal_row(goal, records) for goal in GOALS]
    return "\n".join(lines) + "\n"


def goal_row(goal: Goal, records: Sequence[Record]) -> str:
    sign = "<=" if goal.at_most else ">="
    bound = f"{sign} {number(goal.bound)}{goal.unit}"
    found = goal.measure(records)
    if found is None:
        return f"| {goal.text} | {bound} | | {UNKNOWN} | |"
    verdict = REACHED if goal.reached(found) else MISSED
    return f"| {goal.text} | {bound} | {number(found.value)}{goal.unit} | {verdict} | {found.where} |"


def suite_tables(suite: str, records: Sequence[Record]) -> list[str]:
    """One table for each group of cases."""
    fields, column = TABLES[suite]
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        tables.setdefault(tuple(record.field(name) for name in fields), []).append(record)
    scale = 1e3 if suite == "overhead" else 1.0
    parts = []
    for key, members in tables.items():
        parts.append(f"**{heading(dict(zip(fields, key, strict=True)))}**\n")
        parts.append(table(members, column, scale))
    return parts


def heading(fields: dict[str, Any]) -> str:
    """ "4096 x 4096, cold, 2 threads, avx2" """
    shape = f"{fields.pop('n')} x {fields.pop('d')}" if "n" in fields else ""
    spelled = {"group_size": "group size {}", "threads": "1 thread" if fields.get("threads") == 1 else "{} threads"}
    words = [spelled.get(name, "{}").format(value) for name, value in fields.items()]
    return ", ".join(filter(None, [*words[:1], shape, *words[1:]]))


def table(records: Sequence[Record], column: str, scale: float = 1.0) -> str:
    """Candidates down, values of a field across. The fastest that computes something is bold."""
    columns = sorted({record.field(column) for record in records})
    names = list(dict.fromkeys(record.candidate for record in records))
    cells = {(record.candidate, record.field(column)): record for record in records}
    first = next((record.candidate for record in records if record.role == OURS), names[0])
    prefix = "M = " if column == "m" else ""
    lines = ["| | " + " | ".join(f"{prefix}{value}" for value in columns) + " | error |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name in names:
        row = [cell(cells.get((name, value)), first, cells, value, scale) for value in columns]
        errors = [cells[name, value].error for value in columns if (name, value) in cells]
        known = [error for error in errors if error is not None]
        lines.append(f"| {name} | {' | '.join(row)} | {number(max(known)) if known else ''} |")
    return "\n".join(lines) + "\n"


def cell(record: Record | None, first: str, cells: dict[Any, Record], column: Any, scale: float) -> str:
    if record is None:
        return ""
    rivals = [other.ms for (_, place), other in cells.items() if place == column and other.role != LIMIT]
    text = number(record.ms * scale)
    if record.role != LIMIT and record.ms == min(rivals):
        text = f"**{text}**"
    return f"{text} ({record.ratios[first]:.2f})" if first in record.ratios else text


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
