"""The commands of ``squish-nf4``. They read arguments, call the library and print; what they call never prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from squish_nf4 import __version__
from squish_nf4.checkpoint.encode import DEFAULT_OUTLIER_THRESHOLD
from squish_nf4.commands import terminal
from squish_nf4.fresh_process import TorchScriptError

app = typer.Typer(
    help="Exact 4-bit NF4 weights for PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Whatever the user can do something about ends the command with a sentence on stderr and exit code 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        terminal.complain(
            f"this needs the package {error.name}, which is not installed; type: pip install {error.name}"
        )
    except (ImportError, OSError, ValueError, TypeError, TorchScriptError) as error:
        terminal.complain(str(error))
    except KeyboardInterrupt:
        terminal.complain("stopped")
    else:
        return
    raise typer.Exit(1)


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


@app.command()
def convert(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="IN", help="A .safetensors file, or a model's directory.", show_default=False),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A new or empty directory.", show_default=False)
    ] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="Quantize to NF4, 4 bits per weight. Required.")] = False,
    model_dir: Annotated[
        Path | None, typer.Option("--model-dir", metavar="IN", help="The same as IN.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="The same as OUT.", show_default=False)
    ] = None,
    passthrough: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Keep tensors of this name, part of a name or glob. Repeatable.", show_default=False
        ),
    ] = None,
    outlier_threshold: Annotated[
        float, typer.Option(min=0, help="Keep a tensor in which max|w| / mean|w| of a row exceeds this; inf for none.")
    ] = DEFAULT_OUTLIER_THRESHOLD,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Columns that share a scale; without it 32, 16, 8 or 4, as the row allows.", show_default=False
        ),
    ] = None,
) -> None:
    """Convert a safetensors checkpoint: matrices to 4 bits, all else kept exactly.

    squish-nf4 convert --nf4 IN OUT

    squish-nf4 convert --nf4 --model-dir IN --output OUT
    """
    source = one_of("IN", source, "--model-dir", model_dir)
    target = one_of("OUT", target, "--output", output)
    if not nf4:
        raise typer.BadParameter("say what to convert to: --nf4", param_hint="--nf4")
    with errors_in_one_sentence():
        import squish_nf4

        with terminal.conversion_progress() as progress:
            report = squish_nf4.convert(
                source,
                target,
                group_size=group_size,
                outlier_threshold=outlier_threshold,
                passthrough=passthrough or (),
                progress=progress,
            )
        terminal.print_conversion(report)


def one_of(place: str, positional: Path | None, flag: str, named: Path | None) -> Path:
    """A path that can be given in two ways and has to be given in exactly one."""
    if positional is not None and named is not None:
        raise typer.BadParameter(
            f"given twice, as {place} ({positional}) and as {flag} ({named}); "
            "write either IN OUT or --model-dir IN --output OUT",
            param_hint=place,
        )
    path = named if positional is None else positional
    if path is None:
        raise typer.BadParameter(
            f"missing; write either IN OUT or --model-dir IN --output OUT (here {place} or {flag} is not there)",
            param_hint=place,
        )
    return path


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
        from squish_nf4.commands import export, export_report

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
        Path, typer.Option(metavar="DIR", help="Where the picture and the converted checkpoint go.")
    ] = Path("demo-output"),
) -> None:
    """Quantize a real sentence model, compare it with the dense one, convert its checkpoint."""
    with errors_in_one_sentence():
        from squish_nf4.commands import demo, demo_report

        report = demo.run(output, step=terminal.step)
        demo_report.print_report(report)
        if not report.conversion.verified:
            terminal.complain(f"the converted checkpoint differs from the original in {report.conversion.mismatches}")
            raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what was built and found, and test it."""
    from squish_nf4.commands import doctor, doctor_report

    findings = doctor.examine()
    doctor_report.print_findings(findings)
    if not findings.healthy:
        raise typer.Exit(1)
