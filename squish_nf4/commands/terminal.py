"""What all commands share: consoles, tables, numbers as people read them, progress, and how a command ends in error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import typer
from rich import box, markup
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from squish_nf4.checkpoint.messages import shown, visible
from squish_nf4.torchscript.refusals import TorchScriptError

if TYPE_CHECKING:
    from squish_nf4.checkpoint.messages import Progress

WIDTH_OF_A_FILE = 120  # where there is no terminal whose width could be asked for


class Out(Console):
    """A console that prints on into nothing when its reader has gone, as head does: the command's exit code stands."""

    def on_broken_pipe(self) -> None:
        lead_nowhere(self.file)


def lead_nowhere(stream: IO[str]) -> None:
    """What the stream still holds would fail once more when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def console(*, stderr: bool = False) -> Console:
    """A console on the stdout or stderr of now. Without a terminal it is plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return Out(file=stream, highlight=False, width=None if stream.isatty() else WIDTH_OF_A_FILE)


def escape(text: object) -> str:
    """Text that is printed as it is read: no markup for rich, and nothing that a terminal would obey."""
    return markup.escape(visible(str(text)))


def name(text: object) -> str:
    """A tensor's name or a path, escaped; quoted if it holds what cannot be printed."""
    return markup.escape(shown(text))


def complain(sentence: str) -> None:
    """Print an error on stderr, unwrapped, so that it can be searched for."""
    with suppress(OSError):  # stderr may be full; the exit code says it too
        console(stderr=True).print(f"[bold red]squish-nf4:[/] {escape(sentence)}", soft_wrap=True)


@contextmanager
def errors_in_one_sentence(exit_code: int = 1) -> Iterator[None]:
    """End the command with a sentence on stderr and this exit code, where the user can do something about the error."""
    try:
        yield
    except ModuleNotFoundError as error:
        complain(f"this needs the package {error.name}, which is not installed; type: pip install {error.name}")
    except (ImportError, OSError, ValueError, TypeError, TorchScriptError) as error:
        complain(str(error))
    except KeyboardInterrupt:
        complain("stopped")
    else:
        return
    raise typer.Exit(exit_code)


def size(n_bytes: float) -> str:
    """A number of bytes: 5.4 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A time in the unit that fits: 12 ms, 3.1 s, 2 min 5 s."""
    if seconds >= 99.5:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds >= 9.95:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 0.9995 else f"{1000 * seconds:.0f} ms"


def count(n: int, what: str) -> str:
    """A number of things: 1 tensor, 2 tensors."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def plain_table(*columns: str, title: str | None = None) -> Table:
    """An empty table with one line under its head; numbers, in all columns but the first, stand to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print a line for a step: a spinner while it lasts (on a terminal), then a tick and the time it took."""
    out = console()
    started = time.perf_counter()
    with out.status(f"{escape(text)} ..."):
        yield
    out.print(f"[green]✓[/] {escape(text)} [dim]{duration(time.perf_counter() - started)}[/]")


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None] | None]:
    """Yields what a long task calls with its progress: a bar on a terminal's stderr, nothing elsewhere."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("")

        def show(progress: Progress) -> None:
            if bar.tasks[task].total is None:
                bar.update(task, total=progress.bytes_total)
                bar.reset(task, completed=progress.bytes_done, total=progress.bytes_total)
            bar.update(task, description=name(progress.tensor), completed=progress.bytes_done)

        yield show
