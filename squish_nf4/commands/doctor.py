"""``squish-nf4 doctor``: what it prints, and its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.padding import Padding
from rich.table import Table

from squish_nf4.commands import terminal

if TYPE_CHECKING:
    from squish_nf4.doctor.examine import Findings, Result


def command() -> None:
    """Say what was built and found, and test it."""
    with terminal.errors_in_one_sentence():
        from squish_nf4.doctor.examine import examine

        findings = examine()
        print_findings(findings)
        if not findings.healthy:
            raise typer.Exit(1)


def print_findings(findings: Findings) -> None:
    """Print the facts by topic, a line for each check, and what to do if one failed."""
    out = terminal.console()
    for topic, facts in findings.facts.items():
        out.print(f"[bold]{terminal.escape(topic)}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(terminal.escape(name), terminal.escape(value))
        out.print(Padding(table, (0, 0, 1, 2)))
    out.print("[bold]self-test[/]")
    for result in findings.results:
        out.print(f"  {line_of(result)}", soft_wrap=True)
    failed = sum(not result.passed for result in findings.results)
    out.print()
    if failed:
        out.print(f"[bold red]{failed} of {len(findings.results)} checks failed.[/]")
        for sentence in findings.advice:
            out.print(f"  {terminal.escape(sentence)}", soft_wrap=True)
    else:
        out.print(f"[green]All {len(findings.results)} checks passed.[/]")


def line_of(result: Result) -> str:
    mark = "[green]pass[/]" if result.passed else "[bold red]FAIL[/]"
    return f"{mark}  {result.device:<4}  {terminal.escape(result.name):<38}[dim]{terminal.escape(result.detail)}[/]"
