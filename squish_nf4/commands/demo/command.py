"""The arguments and the exit code of ``squish-nf4 demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squish_nf4.commands import terminal


def command(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the picture, the converted checkpoint and its page go.")
    ] = Path("demo-output"),
) -> None:
    """Quantize a real sentence model, compare it with the dense one, convert, verify and inspect its checkpoint."""
    with terminal.errors_in_one_sentence():
        from squish_nf4.commands.demo.print import print_demo
        from squish_nf4.commands.demo.run import run

        report = run(output, step=terminal.step)
        print_demo(report)
        if not report.conversion.verification.sound:
            for problem in report.conversion.verification.problems:
                terminal.complain(problem)
            raise typer.Exit(1)
