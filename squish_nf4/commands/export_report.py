"""The summary of ``squish-nf4 export`` on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.padding import Padding

from squish_nf4.commands import terminal
from squish_nf4.commands.export import ExportReport
from squish_nf4.commands.terminal import size
from squish_nf4.torchscript import DEPRECATION


def print_report(report: ExportReport) -> None:
    out = terminal.console()
    written, quantized = report.written, report.quantized
    lines = {"File": f"[bold]{escape(str(written.path))}[/], {size(written.bytes)}, {written.route}"}
    if quantized is not None:
        ratio = quantized.bytes_before / max(1, quantized.bytes_after)
        lines["Model"] = (
            f"{terminal.count(len(quantized.layers), 'layer')} to NF4, {len(quantized.left_alone)} left alone: "
            f"{size(quantized.bytes_before)} -> {size(quantized.bytes_after)}, {ratio:.1f} x smaller"
        )
    else:
        lines["Model"] = f"{terminal.count(written.nf4_layers, 'NF4 layer')}, as it came"
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
