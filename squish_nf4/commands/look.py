"""Arguments and exit codes of the commands that look at a directory: ``squish-nf4 verify``, ``inspect``, ``diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squish_nf4.commands import terminal

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
    with terminal.errors_in_one_sentence():
        from squish_nf4.checkpoint.audit.verify import verify
        from squish_nf4.commands.print_look import print_verification

        with terminal.progress_bar() as progress:
            report = verify(path, source, progress=progress)
        print_verification(report)
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
    with terminal.errors_in_one_sentence():
        from squish_nf4.checkpoint.audit.inspection import inspect
        from squish_nf4.commands.inspect.print import print_inspection, print_json

        with terminal.progress_bar() as progress:
            report = inspect(path, source, progress=progress)
        if json:
            print_json(report)
        else:
            print_inspection(report)
        if html is not None:
            from squish_nf4.commands.inspect.page import write_page

            write_page(report, html)
            terminal.console(stderr=True).print(f"Page written: {terminal.name(html)}", soft_wrap=True)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A squish directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
) -> None:
    """Compare the tensors of two squish directories bit for bit, and say where they differ.

    Exit code, like diff's: 0 the same, 1 different, 2 trouble.
    """
    with terminal.errors_in_one_sentence(exit_code=2):
        from squish_nf4.checkpoint.audit.diff import diff
        from squish_nf4.commands.print_look import print_differences

        with terminal.progress_bar() as progress:
            report = diff(a, b, progress=progress)
        print_differences(report)
        if not report.same:
            raise typer.Exit(1)
