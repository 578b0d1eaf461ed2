"""``squish-nf4 convert --json``: events as JSON objects on stdout, one a line. docs/convert.md lists them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from squish_nf4.checkpoint.conversion.plan import ConvertPlan
    from squish_nf4.checkpoint.conversion.report import ConvertReport, TensorReport


def emit(event: str, **facts: Any) -> None:
    typer.echo(json.dumps({"event": event, **facts}, allow_nan=False))


def print_plan(plan: ConvertPlan) -> None:
    for planned in plan.tensors:
        emit(
            "planned",
            name=planned.entry.name,
            kind="kept" if planned.reason else "nf4",
            reason=planned.reason,
            shape=planned.entry.shape,
            group_size=planned.group_size,
            bits_per_weight=planned.bits_per_weight,
            tied_to=planned.tied_to,
            bytes_in=planned.entry.nbytes,
            bytes_out=planned.nbytes,
        )
    emit("plan", tensors=len(plan.tensors), bytes_in=plan.source.nbytes, bytes_out=plan.nbytes)


def print_tensor(tensor: TensorReport) -> None:
    facts = {name: value for name, value in tensor.record().items() if name != "files"}
    emit(
        "tensor",
        name=tensor.name,
        **facts,
        bits_per_weight=tensor.bits_per_weight,
        bytes_in=tensor.bytes_in,
        bytes_out=tensor.bytes_out,
        bytes_saved=tensor.bytes_saved,
        outlier_cost=tensor.outlier_cost,
    )


def print_done(report: ConvertReport) -> None:
    emit(
        "done",
        source=str(report.source),
        output=str(report.output),
        **report.stats(),
        resumed=report.resumed,
        mean_relative_error=report.mean_relative_error,
        worst=report.worst and {"name": report.worst.name, "relative_error": report.worst.relative_error},
        bytes_saved=report.bytes_saved,
        outlier_cost=report.outlier_cost,
        copied=report.copied,
        notes=report.notes,
    )


def print_error(message: str, exit_code: int) -> None:
    emit("error", message=message, exit_code=exit_code, resumable=exit_code != 1)
