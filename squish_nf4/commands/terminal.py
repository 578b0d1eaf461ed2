"""How the command line looks: consoles, tables, numbers as people read them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
