"""What ``squish-nf4 verify`` and ``squish-nf4 diff`` print."""

from __future__ import annotations

from rich.console import Console

from squish_nf4.checkpoint.audit.compare import Differences, Place
from squish_nf4.checkpoint.audit.diff import DiffReport, TensorDiff
from squish_nf4.checkpoint.audit.verify import VerifyReport
from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import count, duration, size

PLURALS = {"index": "indices", "scale": "scales", "value": "values"}


def print_verification(report: VerifyReport) -> None:
    """Print what is wrong, and a verdict; to stdout, problems too: they are what was asked for."""
    out = terminal.console()
    for problem in report.problems:
        out.print(f"[bold red]Wrong:[/] {terminal.escape(problem)}", soft_wrap=True)
    for note in report.notes:
        out.print(f"[yellow]Note:[/] {terminal.escape(note)}", soft_wrap=True)
    out.print(f"{verdict(report)} {what_was_checked(report)}, in {duration(report.seconds)}.", soft_wrap=True)


def verdict(report: VerifyReport) -> str:
    path = terminal.name(report.path)
    if report.sound:
        return f"[bold]{path}[/] is [green]sound[/]:"
    return f"[bold]{path}[/] has [bold red]{count(len(report.problems), 'problem')}[/]:"


def what_was_checked(report: VerifyReport) -> str:
    parts = [f"{count(report.tensors, 'tensor')} in {count(report.files, 'file')}, {size(report.nbytes)}"]
    if report.checksums:
        parts.append(f"{count(report.checksums, 'checksum')} right")
    if report.source is not None:
        parts.append(
            f"against {terminal.name(report.source)} {report.requantized} quantized again to the same bytes, "
            f"{report.equal} kept with the same values"
        )
    return "; ".join(parts)


def print_differences(report: DiffReport) -> None:
    """Print the differences alone, and a last line that sums up."""
    out = terminal.console()
    for path, names in ((report.a, report.only_a), (report.b, report.only_b)):
        for name in names:
            out.print(f"only in {terminal.name(path)}: [bold]{terminal.name(name)}[/]", soft_wrap=True)
    for tensor in report.different:
        print_tensor_diff(out, tensor)
    out.print(verdict_of_diff(report), soft_wrap=True)


def print_tensor_diff(out: Console, tensor: TensorDiff) -> None:
    if tensor.form:
        a, b = tensor.form
        out.print(f"[bold]{terminal.name(tensor.name)}[/]: stored as {a} and as {b}", soft_wrap=True)
    for differences in tensor.differences:
        what = f"1 {differences.what} differs"
        if differences.count > 1:
            what = f"{differences.count} {PLURALS[differences.what]} differ"
        out.print(f"[bold]{terminal.name(tensor.name)}[/]: {what}", soft_wrap=True)
        for place in differences.first:
            out.print(f"  {place_and_values(differences, place)}", soft_wrap=True)
        if differences.count > len(differences.first):
            out.print(f"  and {differences.count - len(differences.first)} more")


def place_and_values(differences: Differences, place: Place) -> str:
    if differences.what == "scale":
        return f"row {place.at[0]}, group {place.at[1]}: {place.a!r} -> {place.b!r}"
    if differences.what == "value":
        return f"{position(place.at)}: {place.a!r} -> {place.b!r}"
    return f"{position(place.at)}: index {place.a} -> {place.b}, weight {place.value_a:.7g} -> {place.value_b:.7g}"


def position(at: tuple[int, ...]) -> str:
    """Where an element is: in a matrix by row and column, else by its index."""
    if len(at) == 2:
        return f"row {at[0]}, column {at[1]}"
    return f"element [{', '.join(map(str, at))}]"


def verdict_of_diff(report: DiffReport) -> str:
    if report.same:
        return f"[green]the same[/]: {count(len(report.equal), 'tensor')}, every bit"
    only = len(report.only_a) + len(report.only_b)
    return f"{count(len(report.different), 'tensor')} different, {only} on one side only, {len(report.equal)} the same"
