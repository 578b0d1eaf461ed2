"""What ``squish-nf4 convert`` prints: a plan and a summary for people, and events as JSON for programs.

docs/convert.md lists the events, one JSON object a line.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import typer
from rich.padding import Padding
from rich.table import Table

from squish_nf4.checkpoint.messages import shown
from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import console, count, duration, plain_table, size

if TYPE_CHECKING:
    from squish_nf4.checkpoint.conversion.plan import ConvertPlan, Planned
    from squish_nf4.checkpoint.conversion.report import ConvertReport, TensorReport


def print_conversion(report: ConvertReport) -> None:
    """Print the summary that `convert` ends with."""
    out = console()
    out.print(f"[bold]{terminal.name(report.source)}[/] -> [bold]{terminal.name(report.output)}[/]", soft_wrap=True)
    out.print(kinds(report))
    if report.kept:
        out.print(reasons(report))
    if report.worst is not None:
        out.print(
            f"  Relative error: mean {report.mean_relative_error:.4f}, "
            f"worst {report.worst.relative_error:.4f} ({terminal.name(report.worst.name)})"
        )
    if report.bytes_saved:
        out.print(f"  Compressed: {size(report.bytes_saved)} less, without a loss")
    if tied := [f"{shown(tensor.name)} ({shown(tensor.tied_to)})" for tensor in report.tensors if tensor.tied_to]:
        out.print(f"  Tied, stored once: {terminal.escape(', '.join(tied))}")
    if report.copied:
        out.print(f"  Copied along: {terminal.escape(', '.join(map(shown, report.copied)))}")
    for note in report.notes:
        out.print(Padding(f"[yellow]Note:[/] {terminal.escape(note)}", (0, 0, 0, 2)))
    out.print(f"  Done in {duration(report.seconds)}{pace(report)}.")


def pace(report: ConvertReport) -> str:
    """How fast a conversion was, as the end of a sentence."""
    if report.resumed:
        return f", after {count(report.resumed, 'tensor')} of an earlier run"
    return f", {size(report.bytes_in / report.seconds)} of input a second"


def print_plan(plan: ConvertPlan) -> None:
    """Print what `convert --dry-run` found."""
    out = console()
    table = plain_table("tensor", "was", "shape", "becomes", "bits per weight", "before", "after")
    for column in table.columns[1:4]:
        column.justify = "left"
    for planned in plan.tensors:
        entry = planned.entry
        table.add_row(
            terminal.name(entry.name),
            str(entry.dtype).removeprefix("torch."),
            " x ".join(map(str, entry.shape)) or "scalar",
            terminal.escape(becomes(planned)),
            f"{planned.bits_per_weight:.2f}",
            size(entry.nbytes),
            size(planned.nbytes),
        )
    table.add_section()
    before, after = plan.source.nbytes, plan.nbytes
    ratio = f"{before / after:.2f} x smaller"
    table.add_row(count(len(plan.tensors), "tensor"), "", "", ratio, "", size(before), size(after), style="bold")
    out.print(table)
    out.print("  Nothing was written.")
    for note in plan.source.notes:
        out.print(Padding(f"[yellow]Note:[/] {terminal.escape(note)}", (0, 0, 0, 2)))


def becomes(planned: Planned) -> str:
    if planned.tied_to:
        return f"stored with {shown(planned.tied_to)}"
    return f"kept: {planned.reason}" if planned.reason else f"NF4, groups of {planned.group_size}"


def kinds(report: ConvertReport, title: str | None = None) -> Table:
    """A table of tensors and bytes by what became of them."""
    groups: defaultdict[str, list[TensorReport]] = defaultdict(list)
    for tensor in sorted(report.tensors, key=lambda tensor: (tensor.kind != "nf4", -(tensor.group_size or 0))):
        label = f"NF4, groups of {tensor.group_size}" if tensor.kind == "nf4" else "kept exactly"
        groups[label].append(tensor)
    table = plain_table("", "tensors", "before", "after", "ratio", "bits per weight", title=title)
    for label, tensors in groups.items():
        table.add_row(label, *sums(tensors), f"{tensors[0].bits_per_weight:.2f}" if tensors[0].group_size else "")
    table.add_section()
    table.add_row("all", *sums(list(report.tensors)), "", style="bold")
    return table


def sums(tensors: list[TensorReport]) -> tuple[str, str, str, str]:
    before, after = sum(tensor.bytes_in for tensor in tensors), sum(tensor.bytes_out for tensor in tensors)
    return str(len(tensors)), size(before), size(after), f"{before / after:.2f} x"


def reasons(report: ConvertReport) -> Table:
    """A table of the kept tensors, grouped by why."""
    groups: defaultdict[str, list[TensorReport]] = defaultdict(list)
    for tensor in report.kept:
        groups[kind_of_reason(tensor.reason or "")].append(tensor)
    table = plain_table("kept because", "tensors", "bytes", "more than NF4", "which")
    table.columns[4].justify = "left"
    for reason, tensors in sorted(groups.items(), key=lambda group: -sum(tensor.bytes_in for tensor in group[1])):
        names = [tensor.name for tensor in sorted(tensors, key=lambda tensor: -tensor.bytes_in)]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        table.add_row(
            terminal.escape(reason),
            str(len(names)),
            size(sum(t.bytes_out for t in tensors)),
            size(cost) if (cost := sum(t.outlier_cost for t in tensors)) else "",
            terminal.escape(", ".join(map(shown, names[:2])) + more),
        )
    return table


def kind_of_reason(reason: str) -> str:
    """A reason without what is true of one tensor only: its row, its largest value, its columns."""
    reason = re.sub(r"^(super weight) in row .*$", r"\1", reason)
    reason = re.sub(r"^outlier row \d+ \(.*(threshold .*)\)$", r"outlier row (\1)", reason)
    return re.sub(r"^(odd number of columns) .*$", r"\1", reason)


# --- events for programs ---------------------------------------------------------------------------------------------


def emit(event: str, **facts: Any) -> None:
    """Print one event: {"event": its name, and what is known of it}. Where nobody reads on, the work goes on."""
    try:
        typer.echo(json.dumps({"event": event, **facts}, allow_nan=False))
    except BrokenPipeError:
        terminal.lead_nowhere(sys.stdout)


def emit_plan(plan: ConvertPlan) -> None:
    for planned in plan.tensors:
        emit(
            "planned",
            name=planned.entry.name,
            kind="kept" if planned.reason else "nf4",
            reason=planned.reason,
            shape=planned.entry.shape,
            group_size=planned.group_size,
            bits_per_weight=planned.bits_per_weight,
            tied_to=planned.tied_to,
            bytes_in=planned.entry.nbytes,
            bytes_out=planned.nbytes,
        )
    emit("plan", tensors=len(plan.tensors), bytes_in=plan.source.nbytes, bytes_out=plan.nbytes)


def emit_tensor(tensor: TensorReport) -> None:
    facts = {name: value for name, value in tensor.record().items() if name != "files"}
    emit(
        "tensor",
        name=tensor.name,
        **facts,
        bits_per_weight=tensor.bits_per_weight,
        bytes_in=tensor.bytes_in,
        bytes_out=tensor.bytes_out,
        bytes_saved=tensor.bytes_saved,
        outlier_cost=tensor.outlier_cost,
    )


def emit_done(report: ConvertReport) -> None:
    emit(
        "done",
        source=str(report.source),
        output=str(report.output),
        **report.stats(),
        resumed=report.resumed,
        mean_relative_error=report.mean_relative_error,
        worst=report.worst and {"name": report.worst.name, "relative_error": report.worst.relative_error},
        bytes_saved=report.bytes_saved,
        outlier_cost=report.outlier_cost,
        copied=report.copied,
        notes=report.notes,
    )


def emit_error(message: str, exit_code: int) -> None:
    emit("error", message=message, exit_code=exit_code, resumable=exit_code != 1)
