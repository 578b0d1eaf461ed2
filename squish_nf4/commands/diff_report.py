"""What ``squish-nf4 diff`` prints: nothing but differences, and a last line that sums up."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from squish_nf4.checkpoint.audit.compare import Differences, Place
from squish_nf4.checkpoint.audit.diff import DiffReport, TensorDiff
from squish_nf4.commands import terminal
from squish_nf4.commands.terminal import count

PLURALS = {"index": "indices", "scale": "scales", "value": "values"}


def print_report(report: DiffReport) -> None:
    out = terminal.console()
    for path, names in ((report.a, report.only_a), (report.b, report.only_b)):
        for name in names:
            out.print(f"only in {escape(str(path))}: [bold]{escape(name)}[/]", soft_wrap=True)
    for tensor in report.different:
        print_tensor(out, tensor)
    out.print(summary(report), soft_wrap=True)


def print_tensor(out: Console, tensor: TensorDiff) -> None:
    if tensor.form:
        a, b = tensor.form
        out.print(f"[bold]{escape(tensor.name)}[/]: stored as {a} and as {b}", soft_wrap=True)
    for differences in tensor.differences:
        what = f"1 {differences.what} differs"
        if differences.count > 1:
            what = f"{differences.count} {PLURALS[differences.what]} differ"
        out.print(f"[bold]{escape(tensor.name)}[/]: {what}", soft_wrap=True)
        for place in differences.first:
            out.print(f"  {where(differences, place)}", soft_wrap=True)
        if differences.count > len(differences.first):
            out.print(f"  and {differences.count - len(differences.first)} more")


def where(differences: Differences, place: Place) -> str:
    if differences.what == "scale":
        return f"row {place.at[0]}, group {place.at[1]}: {place.a!r} -> {place.b!r}"
    if differences.what == "value":
        return f"{position(place.at)}: {place.a!r} -> {place.b!r}"
    return f"{position(place.at)}: index {place.a} -> {place.b}, weight {place.value_a:.7g} -> {place.value_b:.7g}"


def position(at: tuple[int, ...]) -> str:
    """Of an element; of a matrix in words."""
    if len(at) == 2:
        return f"row {at[0]}, column {at[1]}"
    return f"element [{', '.join(map(str, at))}]"


def summary(report: DiffReport) -> str:
    if report.same:
        return f"[green]the same[/]: {count(len(report.equal), 'tensor')}, every bit"
    only = len(report.only_a) + len(report.only_b)
    return f"{count(len(report.different), 'tensor')} different, {only} on one side only, {len(report.equal)} the same"
