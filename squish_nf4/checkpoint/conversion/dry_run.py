"""What a conversion would do, exactly: every value is looked at, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from squish_nf4.checkpoint.conversion import parts
from squish_nf4.checkpoint.conversion.budget import DEFAULT_MAX_RAM, Budget, share_out
from squish_nf4.checkpoint.conversion.encode import Survey
from squish_nf4.checkpoint.conversion.options import Options
from squish_nf4.checkpoint.conversion.pipeline import in_order
from squish_nf4.checkpoint.conversion.plan import Plan, Planned, make_plan
from squish_nf4.checkpoint.conversion.stream import widest
from squish_nf4.checkpoint.messages import Progress


def dry_run(
    src: str | os.PathLike[str],
    options: Options,
    *,
    max_ram: int = DEFAULT_MAX_RAM,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """The plan of a conversion, with what the tensors' values say.

    Raises:
        FileNotFoundError, ValueError: as convert would.
    """
    plan = make_plan(Path(src), options)
    budget = share_out(max_ram, plan.longest_row, torch.get_num_threads())
    with ThreadPoolExecutor(budget.workers) as pool:
        return look_at_values(plan, pool, budget, progress or (lambda _: None))


def look_at_values(plan: Plan, pool: Executor, budget: Budget, progress: Callable[[Progress], None]) -> Plan:
    """The plan with tensors that are kept after all, and with the dtypes of all that are kept.

    Raises:
        ValueError: a weight that would be quantized is not finite.
    """
    looked_at: dict[str, Planned] = {}
    done = 0
    for planned in plan.tensors:
        progress(Progress(planned.entry.name, done, plan.source.nbytes))
        if planned.tied_to is None:
            looked_at[planned.entry.name] = look_at(planned, pool, budget)
        else:
            owner = looked_at[planned.tied_to]
            looked_at[planned.entry.name] = replace(owner, entry=planned.entry, tied_to=planned.tied_to)
        done += planned.entry.nbytes
    return replace(plan, tensors=tuple(looked_at.values()))


def look_at(planned: Planned, pool: Executor, budget: Budget) -> Planned:
    def stretches() -> Iterator[parts.Stretch]:
        return iter(planned.stretches(budget.tile))

    if planned.group_size is not None:
        found = Survey()
        for part in in_order(pool, (partial(parts.survey, planned, stretch) for stretch in stretches()), budget.ahead):
            found = found.joined(part)
        reason = found.reason_to_keep(planned.limits)
        if reason is None:
            return planned
        planned = replace(planned, reason=reason, group_size=None)
    tasks = (partial(parts.look_at_kept, planned, stretch) for stretch in stretches())
    return replace(planned, kept_dtype=widest(in_order(pool, tasks, budget.ahead)))
