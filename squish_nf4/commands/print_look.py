"""What ``squish-nf4 verify`` prints."""

from __future__ import annotations

from rich.markup import escape

from squish_nf4.checkpoint.audit.verify import VerifyReport
from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import count, duration, size


def print_report(report: VerifyReport) -> None:
    """Problems go to stdout like everything else: they are what was asked for."""
    out = terminal.console()
    for problem in report.problems:
        out.print(f"[bold red]Wrong:[/] {escape(problem)}", soft_wrap=True)
    for note in report.notes:
        out.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    out.print(f"{verdict(report)} {what_was_checked(report)}, in {duration(report.seconds)}.", soft_wrap=True)


def verdict(report: VerifyReport) -> str:
    path = escape(str(report.path))
    if report.sound:
        return f"[bold]{path}[/] is [green]sound[/]:"
    return f"[bold]{path}[/] has [bold red]{count(len(report.problems), 'problem')}[/]:"


def what_was_checked(report: VerifyReport) -> str:
    parts = [f"{count(report.tensors, 'tensor')} in {count(report.files, 'file')}, {size(report.nbytes)}"]
    if report.checksums:
        parts.append(f"{count(report.checksums, 'checksum')} right")
    if report.source is not None:
        parts.append(
            f"against {escape(str(report.source))} {report.requantized} quantized again to the same bytes, "
            f"{report.equal} kept with the same values"
        )
    return "; ".join(parts)
