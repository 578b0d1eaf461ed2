"""The commands of ``squish-nf4``, and in which file each one is.

A command reads its arguments, calls the library and prints; what it calls never prints. What it calls is imported when
it runs: --help waits for none of it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from squish_nf4._version import __version__
from squish_nf4.commands import convert, doctor, export, look
from squish_nf4.commands.demo import command as demo

app = typer.Typer(
    help="Exact 4-bit NF4 weights for PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"squish-nf4 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(name="convert")(convert.command)
app.command(name="export")(export.command)
app.command(name="demo")(demo.command)
app.command(name="doctor")(doctor.command)
app.command(name="verify")(look.verify)
app.command(name="inspect")(look.inspect)
app.command(name="diff")(look.diff)
