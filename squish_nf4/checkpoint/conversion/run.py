"""The tensors that are not in the output yet: streamed, committed in batches, and their shards removed if asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.conversion.plan import ConvertPlan, Planned
from squish_nf4.checkpoint.conversion.report import TensorReport
from squish_nf4.checkpoint.conversion.stream import Workers, stream
from squish_nf4.checkpoint.directory.npy_writer import TensorFiles
from squish_nf4.checkpoint.files import sha256_on_disk, sync
from squish_nf4.checkpoint.messages import Progress, shorten, shown
from squish_nf4.checkpoint.resources import require_room
from squish_nf4.checkpoint.source.shard_file import Shard, describe

MOST_TENSORS = 32  # of a batch: their files are open until they are on the disk
MOST_BYTES = 2**28  # of a batch


def write_tensors(
    plan: ConvertPlan,
    output: Output,
    workers: Workers,
    *,
    min_free_gb: float,
    delete_source: bool,
    progress: Callable[[Progress], None],
    on_tensor: Callable[[TensorReport], None],
) -> None:
    """Write every tensor of the plan that the output does not hold; the arguments are those of convert."""
    missing = [planned for planned in plan.tensors if planned.entry.name not in output.records]
    refuse_removed_shards(missing)
    done = plan.source.nbytes - sum(planned.entry.nbytes for planned in missing)

    def announce(planned: Planned, nbytes: int) -> None:
        progress(Progress(planned.entry.name, done + nbytes, plan.source.nbytes))

    def after_batch() -> None:
        if delete_source:
            remove_finished(plan.tensors, output)
        require_room(output.path, 0, min_free_gb)

    with Committer(output, after_batch, on_tensor) as committer:
        to_read = [planned for planned in missing if planned.tied_to is None]
        with closing(stream(to_read, workers, output.new_files, announce)) as written:
            for planned, (report, files) in zip(to_read, written, strict=True):
                done += planned.entry.nbytes
                committer.add(report, files)
        committer.flush()
        committer.wait()
        for planned in missing:
            if (owner := planned.tied_to) is not None:
                announce(planned, 0)
                done += planned.entry.nbytes
                report = TensorReport.from_record(owner, output.records[owner])
                tied = replace(report, name=planned.entry.name, tied_to=owner, files=())
                committer.add(tied, output.new_files(planned.key))
    if delete_source:
        remove_finished(plan.tensors, output)  # also what an earlier run was stopped before
    progress(Progress(plan.tensors[-1].entry.name, done, plan.source.nbytes))


class Committer:
    """Gives finished tensors to the disk in batches, by a thread of its own, while others are being written.

    A context; at its end everything that was added is committed, also if the end is an error.

    Args:
        output: what the tensors become part of, one batch at a time.
        after_batch: called in the other thread when a batch is committed.
        on_tensor: called in this thread with every tensor of a batch that was committed.
    """

    def __init__(
        self, output: Output, after_batch: Callable[[], None], on_tensor: Callable[[TensorReport], None]
    ) -> None:
        self.output, self.after_batch, self.on_tensor = output, after_batch, on_tensor
        self.thread = ThreadPoolExecutor(1)
        self.batch: list[tuple[TensorReport, TensorFiles]] = []
        self.pending: tuple[Future[None], list[TensorReport]] | None = None

    def add(self, report: TensorReport, files: TensorFiles) -> None:
        self.batch.append((report, files))
        if len(self.batch) == MOST_TENSORS or sum(report.bytes_out for report, _ in self.batch) > MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Begins to commit what was added, when the batch before that is committed."""
        self.wait()
        if self.batch:
            reports = [report for report, _ in self.batch]
            self.pending = self.thread.submit(self.commit, self.batch), reports
            self.batch = []

    def commit(self, batch: Sequence[tuple[TensorReport, TensorFiles]]) -> None:
        self.output.commit([(report.name, report.record(), files) for report, files in batch])
        self.after_batch()

    def wait(self) -> None:
        """Returns when nothing is being committed; raises what that ended with."""
        if self.pending is not None:
            (future, reports), self.pending = self.pending, None
            future.result()
            for report in reports:
                self.on_tensor(report)

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
            self.wait()
        except Exception:
            if error is None:  # else what came first is what matters; part files that are left go with a resume
                raise
        finally:
            for _, files in self.batch:
                files.discard()
            self.thread.shutdown()


# --- shards removed once their output is on the disk: delete_source ---------------------------------------------------


def refuse_links(shards: Sequence[Shard]) -> None:
    """Removing a link frees nothing, and what it leads to may be used elsewhere."""
    for shard in shards:
        if shard.path.is_symlink():
            raise ValueError(
                f"delete_source: {shown(shard.path)} is a symbolic link; give the files themselves, or keep them"
            )
        if shard.path.exists() and shard.path.stat().st_nlink > 1:
            raise ValueError(f"delete_source: {shown(shard.path)} has another name elsewhere (a hard link); keep it")


def refuse_removed_shards(missing: Sequence[Planned]) -> None:
    """Refuses tensors that are to be converted, though their shard was removed when they had been."""
    for planned in missing:
        if not planned.entry.shard.path.exists():
            raise ValueError(
                f"tensor {shorten(planned.entry.name)}: what was made of it is gone, and so is its shard, "
                f"{shown(planned.entry.shard.path)}; bring either of them back"
            )


def remove_finished(plan: Sequence[Planned], output: Output) -> None:
    """Removes every shard of which all is in the output, after reading that back from the disk.

    Raises:
        ValueError: a file is not what was written. Nothing is removed then.
    """
    tensors: dict[Shard, list[str]] = {}
    for planned in plan:
        tensors.setdefault(planned.entry.shard, []).append(planned.entry.name)
    for shard, names in tensors.items():
        if all(name in output.records for name in names) and shard.path.exists():
            require_read_back(output.folder, [output.records[name] for name in names])
            require_as_read(shard)
            output.journal.append([{"removed": shard.path.name}])
            try:
                require_as_read(shard)  # once more: the disk may have taken its time
            except ValueError:
                output.journal.take_back()
                raise
            shard.path.unlink()
            sync(shard.path.parent)


def require_as_read(shard: Shard) -> None:
    """Raises ValueError if the shard is not the file that was read, or was written to since."""
    if shard.has_changed(shard.path.lstat()) or describe(shard.path)[0] != shard:
        raise ValueError(
            f"{shown(shard.path)} was replaced or changed after it was read, and is not removed; convert it anew"
        )


def require_read_back(folder: Path, records: Collection[Mapping[str, Any]]) -> None:
    for record in records:
        for name, facts in record["files"].items():
            if sha256_on_disk(folder / name) != facts["sha256"]:
                raise ValueError(f"{shown(folder / name)} does not read back as it was written; the source is kept")
