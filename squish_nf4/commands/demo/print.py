"""What ``squish-nf4 demo`` prints."""

from __future__ import annotations

import torch
from rich.table import Table

from squish_nf4 import _C
from squish_nf4.checkpoint.audit.measure import entropy_of
from squish_nf4.commands import print_convert, terminal
from squish_nf4.commands.demo.agreement import Agreement, Floats
from squish_nf4.commands.demo.run import Conversion, DemoReport, Seconds
from squish_nf4.commands.terminal import count, duration, size


def print_demo(report: DemoReport) -> None:
    """Print the comparison, the conversion, and where the files are."""
    out = terminal.console()
    out.print()
    out.print(comparison(report))
    out.print(
        f"  [dim]{torch.get_num_threads()} threads, CPU path {_C.cpu_isa()}, torch {torch.__version__}; "
        "times are medians, the models taking turns[/]"
    )
    out.print()
    conversion = report.conversion
    out.print(
        print_convert.kinds(conversion.report, title="Its checkpoint, as [cyan]squish-nf4 convert --nf4[/] writes it")
    )
    out.print(print_convert.reasons(conversion.report))
    out.print(
        f"  Written in {duration(conversion.report.seconds)}, verified in "
        f"{duration(conversion.verification.seconds)}: {verdict(conversion)}"
    )
    inspection = conversion.inspection
    out.print(
        f"  Inspected: {inspection.nf4_bits_per_weight:.2f} bits a weight in NF4, relative RMS error "
        f"{inspection.relative_rms:.4f}, {entropy_of(inspection.indices):.2f} of 4 index bits used"
    )
    out.print()
    out.print(f"  Picture     [cyan]{terminal.name(report.picture)}[/]", soft_wrap=True)
    out.print(f"  Checkpoint  [cyan]{terminal.name(conversion.report.output)}[/]", soft_wrap=True)
    out.print(f"  Its page    [cyan]{terminal.name(conversion.page)}[/]", soft_wrap=True)
    out.print(f"  All done in {duration(report.seconds)}.")


def comparison(report: DemoReport) -> Table:
    """A table: the dense model and the NF4 one in bytes, in what they say, in time."""
    agreement = report.agreement
    title = f"The sentence model all-MiniLM-L6-v2 and {report.sentences} sentences"
    table = terminal.plain_table("", "dense", "NF4", "", title=title)
    encoder = (report.quantized.bytes_before, report.quantized.bytes_after)
    table.add_row("encoder", *map(size, encoder), smaller(*encoder), style="bold")
    table.add_row("bits per weight", "32", f"{report.bits_per_weight:.2f}", "")
    table.add_row("whole model, its embeddings dense", *map(size, report.model_bytes), smaller(*report.model_bytes))
    table.add_section()
    table.add_row("cosine of a sentence's two embeddings, mean", "1", f"{agreement.mean_cosine:.4f}", "")
    table.add_row("the same, worst", "1", f"{agreement.worst_cosine:.4f}", "")
    table.add_row("rank correlation of sentence similarities", "1", f"{agreement.rank_correlation:.4f}", "")
    table.add_row(
        "paraphrase is the nearest sentence", *(partners_found(s) for s in (agreement.dense, agreement.nf4)), ""
    )
    table.add_section()
    table.add_row("time for all, in one batch", *times(report.in_one_batch))
    table.add_row("time for all, one by one", *times(report.one_by_one))
    return table


def smaller(before: int, after: int) -> str:
    return f"[green]{before / after:.1f} x smaller[/]"


def partners_found(similarities: Floats) -> str:
    return f"{Agreement.partners_found(similarities)} of {len(similarities)}"


def times(seconds: Seconds) -> tuple[str, str, str]:
    ratio = seconds.dense / seconds.nf4
    verdict = f"[green]{ratio:.2f} x faster[/]" if ratio >= 1 else f"{1 / ratio:.2f} x slower"
    return duration(seconds.dense), duration(seconds.nf4), verdict


def verdict(conversion: Conversion) -> str:
    found = conversion.verification
    if not found.sound:
        return f"[bold red]{count(len(found.problems), 'problem')}.[/]"
    return (
        f"[green]all {found.tensors} tensors are right[/], {found.requantized} quantized again to the same bytes, "
        f"{found.equal} equal to the original, {found.checksums} checksums."
    )
