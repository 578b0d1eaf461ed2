"""The summary of ``squish-nf4 export`` on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.padding import Padding

from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import size
from squish_nf4.integrations.model_source import ExportReport
from squish_nf4.model import QuantizeReport
from squish_nf4.torchscript.export import DEPRECATION


def print_report(report: ExportReport) -> None:
    out = terminal.console()
    written, quantized = report.written, report.quantized
    lines = {"File": f"[bold]{escape(str(written.path))}[/], {size(written.bytes)}, {written.route}"}
    if quantized is None:
        lines["Model"] = f"{written.contents}, as it came"
    elif quantized.layers:
        lines["Model"] = what_was_quantized(quantized)
    else:
        lines["Model"] = f"{written.contents}; nothing to quantize, {len(quantized.left_alone)} left alone"
    if written.why_traced:
        lines["Traced"] = f"it cannot be scripted: {escape(written.why_traced)}"
    if report.signature:
        lines["Call"] = escape(report.signature)
    lines["Checked"] = f"[green]{written.verification}[/]" if written.same_bits else written.verification
    for label, text in lines.items():
        out.print(f"  {label:<8}{text}", soft_wrap=True)
    for note in (*(quantized.notes if quantized else ()), *written.notes):
        out.print(Padding(f"[yellow]Note:[/] {escape(note)}", (0, 0, 0, 2)))
    out.print(Padding(f"[dim]{DEPRECATION}.[/]", (0, 0, 0, 2)))


def what_was_quantized(report: QuantizeReport) -> str:
    ratio = report.bytes_before / max(1, report.bytes_after)
    return (
        f"{terminal.count(len(report.layers), 'layer')} to NF4, {len(report.left_alone)} left alone: "
        f"{size(report.bytes_before)} -> {size(report.bytes_after)}, {ratio:.1f} x smaller"
    )
