"""The commands of ``squish-nf4``. They read arguments, call the library and print; what they call never prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squish_nf4 import __version__
from squish_nf4.commands import convert, terminal
from squish_nf4.commands import look as looking
from squish_nf4.commands.errors import errors_in_one_sentence

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


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A Hugging Face model's directory, or package.module:function.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, usually *.pt.")],
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Columns that share a scale; 64 without it.", show_default=False)
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave layers of this name alone. Repeatable.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Quantize layers of this name alone. Repeatable.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Write a model with NF4 layers as TorchScript, for C++ and for Python without squish_nf4.

    A function returns the model, or the model and example inputs.
    """
    with errors_in_one_sentence():
        from squish_nf4.commands import export_report
        from squish_nf4.integrations import model_source as export

        report = export.run(
            source,
            target,
            group_size=group_size,
            skip=skip or (),
            only=only or None,
            overwrite=overwrite,
            step=terminal.step,
        )
        export_report.print_report(report)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the picture, the converted checkpoint and its page go.")
    ] = Path("demo-output"),
) -> None:
    """Quantize a real sentence model, compare it with the dense one, convert, verify and inspect its checkpoint."""
    with errors_in_one_sentence():
        from squish_nf4.commands.demo import print as demo_report
        from squish_nf4.commands.demo import run as demo

        report = demo.run(output, step=terminal.step)
        demo_report.print_report(report)
        if not report.conversion.verification.sound:
            for problem in report.conversion.verification.problems:
                terminal.complain(problem)
            raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what was built and found, and test it."""
    from squish_nf4.commands import print_doctor as doctor_report
    from squish_nf4.doctor import examine as doctor

    findings = doctor.examine()
    doctor_report.print_findings(findings)
    if not findings.healthy:
        raise typer.Exit(1)


for command in (looking.verify, looking.inspect, looking.diff):
    app.command()(command)
