"""How the command line looks: consoles, numbers as people read them, progress, and the summary of a conversion."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from squish_nf4.checkpoint.convert import Progress as Converting
    from squish_nf4.checkpoint.report import ConvertReport, TensorReport

WIDTH_OF_A_FILE = 120  # where there is no terminal whose width could be asked for


def console(*, stderr: bool = False) -> Console:
    """A console on the stdout or stderr of now. Without a terminal it is plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH_OF_A_FILE)


def complain(sentence: str) -> None:
    """An error on stderr, unwrapped, so that it can be searched for."""
    console(stderr=True).print(f"[bold red]squish-nf4:[/] {escape(sentence)}", soft_wrap=True)


def size(n_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    if seconds >= 99.5:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds >= 9.95:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 0.9995 else f"{1000 * seconds:.0f} ms"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table with one line under its head; numbers, in all columns but the first, stand to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


@contextmanager
def step(text: str) -> Iterator[None]:
    """A line per step: a spinner while it lasts (on a terminal), then a tick and the time it took."""
    out = console()
    started = time.perf_counter()
    with out.status(f"{escape(text)} ..."):
        yield
    out.print(f"[green]✓[/] {escape(text)} [dim]{duration(time.perf_counter() - started)}[/]")


@contextmanager
def conversion_progress() -> Iterator[Callable[[Converting], None] | None]:
    """Yields what convert() calls with its progress: a bar on a terminal's stderr, nothing elsewhere."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.description}"))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("")

        def show(progress: Converting) -> None:
            name = escape(progress.tensor)
            bar.update(task, description=name, completed=progress.bytes_done, total=progress.bytes_total)

        yield show


def print_conversion(report: ConvertReport) -> None:
    """The summary that `convert` ends with."""
    out = console()
    out.print(f"[bold]{escape(str(report.source))}[/] -> [bold]{escape(str(report.output))}[/]", soft_wrap=True)
    out.print(kinds(report))
    if report.kept:
        out.print(reasons(report))
    if report.worst is not None:
        out.print(
            f"  Relative error: mean {report.mean_relative_error:.4f}, "
            f"worst {report.worst.relative_error:.4f} ({escape(report.worst.name)})"
        )
    if report.copied:
        out.print(f"  Copied along: {escape(', '.join(report.copied))}")
    for note in report.notes:
        out.print(Padding(f"[yellow]Note:[/] {escape(note)}", (0, 0, 0, 2)))
    out.print(f"  Done in {duration(report.seconds)}.")


def kinds(report: ConvertReport, title: str | None = None) -> Table:
    """Tensors and bytes by what became of them."""
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
    """The kept tensors, grouped by why."""
    groups: defaultdict[str, list[TensorReport]] = defaultdict(list)
    for tensor in report.kept:
        groups[kind_of_reason(tensor.reason or "")].append(tensor)
    table = plain_table("kept because", "tensors", "bytes", "which")
    table.columns[3].justify = "left"
    for reason, tensors in sorted(groups.items(), key=lambda group: -sum(tensor.bytes_in for tensor in group[1])):
        names = [tensor.name for tensor in sorted(tensors, key=lambda tensor: -tensor.bytes_in)]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        table.add_row(
            escape(reason),
            str(len(names)),
            size(sum(t.bytes_out for t in tensors)),
            escape(", ".join(names[:2]) + more),
        )
    return table


def kind_of_reason(reason: str) -> str:
    """A reason without what is true of one tensor only: its row, its largest value, its columns."""
    reason = re.sub(r"^outlier row \d+ \(.*(threshold .*)\)$", r"outlier row (\1)", reason)
    return re.sub(r"^(odd number of columns) .*$", r"\1", reason)
