"""The tensors that are not in the output yet: streamed, committed, reported, and their shards removed if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, replace

from squish_nf4.checkpoint.conversion import removal
from squish_nf4.checkpoint.conversion.budget import Budget
from squish_nf4.checkpoint.conversion.committer import Batch, Committer
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import Plan, Planned
from squish_nf4.checkpoint.conversion.report import TensorReport
from squish_nf4.checkpoint.conversion.stream import Outcome, stream
from squish_nf4.checkpoint.directory.npy_writer import StoredFile
from squish_nf4.checkpoint.messages import Progress
from squish_nf4.checkpoint.resources import require_room
from squish_nf4.checkpoint.values import dtype_name


@dataclass
class Run:
    """The writing of the tensors that are not in the output yet."""

    plan: Plan
    output: Output
    min_free_gb: float
    delete_source: bool
    progress: Callable[[Progress], None] | None
    on_tensor: Callable[[TensorReport], None] | None

    def write_tensors(self, pool: Executor, budget: Budget) -> None:
        missing = [planned for planned in self.plan.tensors if planned.entry.name not in self.output.records]
        removal.refuse_lost(missing)
        done = self.plan.source.nbytes - sum(planned.entry.nbytes for planned in missing)

        def announce(planned: Planned, nbytes: int) -> None:
            self.announce(planned.entry.name, done + nbytes)

        with Committer(self.commit, self.on_tensor or (lambda _: None)) as committer:
            to_read = [planned for planned in missing if planned.tied_to is None]
            with closing(stream(to_read, budget, pool, self.output.new_files, announce)) as written:
                for planned, outcome, files in written:
                    done += planned.entry.nbytes
                    committer.add(report_on(planned, outcome, files.finish()), files)
            committer.flush()
            committer.wait()
            for planned in missing:
                if planned.tied_to is not None:
                    announce(planned, 0)
                    done += planned.entry.nbytes
                    committer.add(self.report_on_tied(planned), self.output.new_files(planned.key))
        if self.delete_source:
            removal.remove_finished(self.plan.tensors, self.output)  # also what an earlier run was stopped before
        self.announce(self.plan.tensors[-1].entry.name, done)

    def announce(self, name: str, done: int) -> None:
        if self.progress:
            self.progress(Progress(name, done, self.plan.source.nbytes))

    def commit(self, batch: Batch) -> None:
        self.output.commit([(report.name, report.record(), files) for report, files in batch])
        if self.delete_source:
            removal.remove_finished(self.plan.tensors, self.output)
        require_room(self.output.path, 0, self.min_free_gb)

    def report_on_tied(self, planned: Planned) -> TensorReport:
        assert planned.tied_to is not None
        owner = TensorReport.from_record(planned.tied_to, self.output.records[planned.tied_to])
        return replace(owner, name=planned.entry.name, tied_to=planned.tied_to, files=())


def report_on(planned: Planned, outcome: Outcome, files: Sequence[StoredFile]) -> TensorReport:
    large_weight = planned.group_size is not None and outcome.kind == "kept" and outcome.outlier is not None
    return TensorReport(
        name=planned.entry.name,
        kind=outcome.kind,
        reason=outcome.reason,
        source_dtype=dtype_name(planned.entry.dtype),
        stored_dtype=outcome.stored_dtype,
        shape=planned.entry.shape,
        group_size=planned.group_size if outcome.kind == "nf4" else None,
        relative_error=outcome.relative_error,
        outlier=outcome.outlier,
        nf4_bytes=planned.nf4_nbytes if large_weight else None,
        finite=outcome.finite,
        tied_to=None,
        files=tuple(files),
    )
