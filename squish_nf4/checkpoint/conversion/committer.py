"""Finished tensors given to the disk in batches, by a thread of its own, while others are being written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from squish_nf4.checkpoint.conversion.report import TensorReport
from squish_nf4.checkpoint.directory.npy_writer import TensorFiles

Batch = list[tuple[TensorReport, TensorFiles]]

MOST_TENSORS = 32  # of a batch: their files are open until they are on the disk
MOST_BYTES = 2**28


class Committer:
    """A context; at its end everything that was added is committed, also if the end is an error.

    Args:
        commit: makes a batch part of the output; runs in the other thread, one batch at a time.
        done: called in this thread with every tensor of a batch that was committed.
    """

    def __init__(self, commit: Callable[[Batch], None], done: Callable[[TensorReport], None]) -> None:
        self.commit, self.done = commit, done
        self.thread = ThreadPoolExecutor(1)
        self.batch: Batch = []
        self.pending: tuple[Future[None], Batch] | None = None

    def add(self, report: TensorReport, files: TensorFiles) -> None:
        self.batch.append((report, files))
        if len(self.batch) == MOST_TENSORS or sum(report.bytes_out for report, _ in self.batch) > MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Begins to commit what was added, when the batch before that is committed."""
        self.wait()
        if self.batch:
            self.pending = self.thread.submit(self.commit, self.batch), self.batch
            self.batch = []

    def wait(self) -> None:
        if self.pending is not None:
            (future, batch), self.pending = self.pending, None
            future.result()
            for report, _ in batch:
                self.done(report)

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            self.wait()
        except Exception:
            if error is None:  # else what came first is what matters; parts that are left are removed by a resume
                raise
        finally:
            for _, files in self.batch:
                files.discard()
            self.thread.shutdown()
