"""``squish-nf4 export``: a model of a directory or a function as TorchScript; the command's arguments and summary.

TorchScript it is: torch.export, which "export" means elsewhere, is called from Python and needs no command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding

from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import size

if TYPE_CHECKING:
    from squish_nf4.integrations.model_source import ExportReport
    from squish_nf4.model.report import QuantizeReport


def command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A Hugging Face model's directory, or package.module:function.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The TorchScript file to write, usually *.pt.")],
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

    A function returns the model, or the model and example inputs. (Not torch.export, which is called from Python.)
    """
    with terminal.errors_in_one_sentence():
        from squish_nf4.integrations.model_source import export_source

        if target.is_file() and not overwrite:
            raise FileExistsError(f"{target} exists; --overwrite replaces it")
        report = export_source(
            source,
            target,
            group_size=group_size,
            skip=skip or (),
            only=only or None,
            overwrite=overwrite,
            step=terminal.step,
        )
        print_export(report)


def print_export(report: ExportReport) -> None:
    """Print what was written, of which model, and how it was tried."""
    from squish_nf4.torchscript.export import DEPRECATION

    out = terminal.console()
    written, quantized = report.written, report.quantized
    lines = {"File": f"[bold]{terminal.name(written.path)}[/], {size(written.bytes)}, {written.route}"}
    if quantized is None:
        lines["Model"] = f"{written.contents}, as it came"
    elif quantized.layers:
        lines["Model"] = what_was_quantized(quantized)
    else:
        lines["Model"] = f"{written.contents}; nothing to quantize, {len(quantized.left_alone)} left alone"
    if written.why_traced:
        lines["Traced"] = f"it cannot be scripted: {terminal.escape(written.why_traced)}"
    if report.signature:
        lines["Call"] = terminal.escape(report.signature)
    lines["Checked"] = f"[green]{written.verification}[/]" if written.same_bits else written.verification
    for label, text in lines.items():
        out.print(f"  {label:<8}{text}", soft_wrap=True)
    for note in (*(quantized.notes if quantized else ()), *written.notes):
        out.print(Padding(f"[yellow]Note:[/] {terminal.escape(note)}", (0, 0, 0, 2)))
    out.print(Padding(f"[dim]{DEPRECATION}.[/]", (0, 0, 0, 2)))


def what_was_quantized(report: QuantizeReport) -> str:
    ratio = report.bytes_before / max(1, report.bytes_after)
    return (
        f"{terminal.count(len(report.layers), 'layer')} to NF4, {len(report.left_alone)} left alone: "
        f"{size(report.bytes_before)} -> {size(report.bytes_after)}, {ratio:.1f} x smaller"
    )
