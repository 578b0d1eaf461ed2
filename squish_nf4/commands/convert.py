"""``squish-nf4 convert``: its arguments, its exit codes, and on which stream it says what."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from squish_nf4.checkpoint.conversion.budget import DEFAULT_MAX_RAM
from squish_nf4.checkpoint.conversion.options import DEFAULT_OUTLIER_THRESHOLD
from squish_nf4.checkpoint.resources import DEFAULT_MIN_FREE_GB
from squish_nf4.commands import print_convert, terminal

RESUMABLE = 3
INTERRUPTED = 130  # as a shell has it: 128 and the number of SIGINT
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_of(text: str) -> int:
    """The bytes of a size as people write it: 800MB, 1.5GiB, or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise typer.BadParameter(f"{text!r} is no size; write 800MB or 1.5GiB, for example")
    return int(float(found[1]) * units[found[2].lower()])


def command(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="IN", help="A .safetensors file, or a model's directory.", show_default=False),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A new or empty directory.", show_default=False)
    ] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="Quantize to NF4, 4 bits per weight. This or --ultra.")] = False,
    ultra: Annotated[
        bool, typer.Option("--ultra", help="The same, and compress what is not NF4 where that makes it smaller.")
    ] = False,
    model_dir: Annotated[
        Path | None, typer.Option("--model-dir", metavar="IN", help="The same as IN.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="The same as OUT.", show_default=False)
    ] = None,
    passthrough: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep tensors of this name, part of a name or glob, besides the routers of mixtures of experts. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Quantize such tensors though they are routers or hold a large weight. Repeatable.",
            show_default=False,
        ),
    ] = None,
    outlier_threshold: Annotated[
        float, typer.Option(min=0, help="Keep a tensor in which max|w| / mean|w| of a row exceeds this; inf for none.")
    ] = DEFAULT_OUTLIER_THRESHOLD,
    super_weight: Annotated[
        bool, typer.Option("--super-weight", help="Keep a tensor in which max|w| / mean|w| of a row exceeds 100.")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Columns that share a scale; without it 32, 16, 8 or 4, as the row allows.", show_default=False
        ),
    ] = None,
    max_ram: Annotated[
        int, typer.Option(metavar="SIZE", parser=bytes_of, help="Memory to use at most: 800MB, 1.5GiB.")
    ] = f"{DEFAULT_MAX_RAM // 2**30}GiB",  # type: ignore[assignment]  # the parser takes the default too
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to quantize: cpu, cuda, cuda:1. The bytes are the same.")
    ] = "cpu",
    min_free_gb: Annotated[
        float, typer.Option(min=0, help="Gigabytes that stay free on the disk.")
    ] = DEFAULT_MIN_FREE_GB,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in OUT.")] = False,
    delete_source: Annotated[
        bool, typer.Option("--delete-source", help="Remove each shard when its output was read back from the disk.")
    ] = False,
    only_plan: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one a line.")] = False,
) -> None:
    """Convert a safetensors checkpoint: matrices to 4 bits, all else kept exactly.

    squish-nf4 convert --nf4 IN OUT

    squish-nf4 convert --nf4 --model-dir IN --output OUT

    Ends with 0 when all is done, 1 when something is wrong, 2 when the command is, 3 when the disk or the GPU stopped
    it and --resume goes on, 130 after Ctrl-C, likewise.
    """
    source = one_of("IN", source, "--model-dir", model_dir)
    target = one_of("OUT", target, "--output", output) if output or target or not only_plan else None
    if not nf4 and not ultra:
        raise typer.BadParameter("say what to convert to: --nf4 or --ultra", param_hint="--nf4")
    if resume and overwrite:
        raise typer.BadParameter("go on, or start anew: --resume or --overwrite", param_hint="--resume")
    with ending(json):
        from squish_nf4.checkpoint.conversion.convert import convert, dry_run

        options = {
            "group_size": group_size,
            "outlier_threshold": outlier_threshold,
            "passthrough": passthrough or (),
            "include": include or (),
            "super_weight": super_weight,
            "ultra": ultra,
        }
        if only_plan or target is None:
            with terminal.progress_bar() as progress:
                plan = dry_run(source, max_ram=max_ram, device=device, progress=progress, **options)
            print_convert.emit_plan(plan) if json else print_convert.print_plan(plan)
            return
        with terminal.progress_bar() as progress:
            report = convert(
                source,
                target,
                max_ram=max_ram,
                device=device,
                min_free_gb=min_free_gb,
                resume=resume,
                overwrite=overwrite,
                delete_source=delete_source,
                progress=progress,
                on_tensor=print_convert.emit_tensor if json else None,
                **options,
            )
        print_convert.emit_done(report) if json else print_convert.print_conversion(report)


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


@contextmanager
def ending(json: bool) -> Iterator[None]:
    """Give an error its exit code and, if asked for, its event; the sentence on stderr comes in any case."""
    with terminal.errors_in_one_sentence():
        from squish_nf4.checkpoint.conversion.convert import UnfinishedError

        try:
            yield
        except BaseException as error:
            code = {UnfinishedError: RESUMABLE, KeyboardInterrupt: INTERRUPTED}.get(type(error), 1)
            if not isinstance(error, OSError | ValueError | TypeError | KeyboardInterrupt):
                raise
            sentence = without_errno(error) or "interrupted"
            if json:
                try:
                    print_convert.emit_error(sentence, code)
                except OSError:  # nobody reads on
                    terminal.lead_nowhere(sys.stdout)
            terminal.complain(sentence)
            raise typer.Exit(code) from error


def without_errno(error: BaseException) -> str:
    """What an error says, without the "[Errno 28]" that Python puts before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return str(error)
