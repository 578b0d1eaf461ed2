"""The commands that look at what was written: verify, inspect and diff. cli.py lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from squish_nf4.commands import print_convert as convert_report
from squish_nf4.commands import terminal
from squish_nf4.commands.errors import errors_in_one_sentence

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A squish directory.", show_default=False)]
Source = Annotated[
    Path | None,
    typer.Option(
        metavar="SRC", help="The .safetensors file or model's directory that it was made of.", show_default=False
    ),
]


def verify(path: Directory, source: Source = None) -> None:
    """Check a squish directory: structure, checksums, values; with --source every byte of it.

    Exit code 0: sound. 1: something is wrong or cannot be checked, a line each. 2: wrong usage.
    """
    with errors_in_one_sentence():
        from squish_nf4.checkpoint.audit.verify import verify
        from squish_nf4.commands import print_look as verify_report

        with convert_report.conversion_progress() as progress:
            report = verify(path, source, progress=progress)
        verify_report.print_report(report)
        if not report.sound:
            raise typer.Exit(1)


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="A squish directory, a .npy file of one, or a quantized model's .safetensors.",
            show_default=False,
        ),
    ],
    source: Source = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Also write a page with plots.", show_default=False)
    ] = None,
) -> None:
    """Say what each tensor is stored as, at how many bits, with which error; --source measures errors.

    Exit code 0: done. 1: it cannot be read. 2: wrong usage.
    """
    with errors_in_one_sentence():
        from squish_nf4.checkpoint.audit.inspection import inspect
        from squish_nf4.commands.inspect import print as inspect_report

        with convert_report.conversion_progress() as progress:
            report = inspect(path, source, progress=progress)
        if json:
            inspect_report.print_json(report)
        else:
            inspect_report.print_report(report)
        if html is not None:
            from squish_nf4.commands.inspect import page as inspect_page

            inspect_page.write_page(report, html)
            terminal.console(stderr=True).print(f"Page written: {escape(str(html))}", soft_wrap=True)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A squish directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
) -> None:
    """Compare the tensors of two squish directories bit for bit, and say where they differ.

    Exit code, like diff's: 0 the same, 1 different, 2 trouble.
    """
    with errors_in_one_sentence(exit_code=2):
        from squish_nf4.checkpoint.audit.diff import diff
        from squish_nf4.commands import diff_report

        with convert_report.conversion_progress() as progress:
            report = diff(a, b, progress=progress)
        diff_report.print_report(report)
        if not report.same:
            raise typer.Exit(1)
