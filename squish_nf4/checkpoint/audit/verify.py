"""Whether a squish directory is what it says, and what its source becomes: every problem found, not the first alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from squish_nf4.checkpoint.audit.compare import compare_with_source
from squish_nf4.checkpoint.directory.format import SIDECAR
from squish_nf4.checkpoint.directory.reader import SquishDirectory, open_leniently
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.files import inside, require_file, sha256_of
from squish_nf4.checkpoint.messages import Progress, listed, shorten, visible
from squish_nf4.checkpoint.source.shards import Source, open_source


@dataclass
class VerifyReport:
    """What verify looked at, and what is wrong with it.

    Attributes:
        path: the directory.
        source: what it was compared with, if anything.
        tensors: how many were looked at.
        files: how many files of theirs.
        nbytes: bytes of these files.
        checksums: files whose recorded SHA-256 is right.
        requantized: tensors whose bytes are what NF4 makes of the source.
        equal: kept tensors whose values are those of the source.
        problems: what is wrong, a sentence each.
        notes: what could not be checked, or is worth knowing.
        seconds: how long it took.
    """

    path: Path
    source: Path | None
    tensors: int = 0
    files: int = 0
    nbytes: int = 0
    checksums: int = 0
    requantized: int = 0
    equal: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Check a squish directory: tables, headers, sizes, checksums, values; with its source also every byte of it.

    Args:
        path: the directory.
        source: the .safetensors file or the directory that it was converted from. Each tensor in NF4 is quantized again
            and compared byte for byte, each kept one value for value.
        progress: called as each tensor begins, to be checked and again to be compared.

    Raises:
        FileNotFoundError: path or source is not there.
        ValueError: the source cannot be read.
    """
    started = time.perf_counter()
    report = VerifyReport(Path(path), Path(source) if source is not None else None)
    original = open_source(report.source) if report.source is not None else None
    try:
        directory = open_leniently(path, lambda error: report.problems.append(str(error)))
    except ValueError as error:
        report.problems.append(str(error))
    else:
        check_all(directory, original, report, progress or (lambda _: None))
        try:
            directory.snapshot.require_unchanged()
        except ValueError as error:
            report.problems.append(str(error))
    report.seconds = time.perf_counter() - started
    return report


def check_all(
    directory: SquishDirectory, source: Source | None, report: VerifyReport, announce: Callable[[Progress], None]
) -> None:
    total = directory.nbytes + (source.nbytes if source else 0)
    check_tables(directory, report)
    check_copied(directory, report)
    for tensor in directory.owned:
        announce(Progress(tensor.name, report.nbytes, total))
        check_tensor(directory, tensor, report)
    if source is None:
        return
    done = report.nbytes
    check_names(directory, {entry.name for entry in source.entries}, report)
    for entry, w in source.tensors():
        announce(Progress(entry.name, done, total))
        done += entry.nbytes
        if entry.name in directory.tensors:
            check_against(directory, entry.name, w, report)


def check_tables(directory: SquishDirectory, report: VerifyReport) -> None:
    if directory.records is None:
        report.notes.append(f"there is no {SIDECAR}: another program wrote it, and no checksum is known")
        if directory.unclaimed:
            report.notes.append(f"files of no tensor that the manifest names: {listed(directory.unclaimed)}")
    elif unrecorded := [name for name in directory.tensors if name not in directory.records]:
        report.problems.append(f"{SIDECAR} does not record {listed(unrecorded)}")
    elif unchecked := [tensor.name for tensor in directory.owned if "files" not in directory.records[tensor.name]]:
        report.notes.append(f"{SIDECAR} records no files, and so no checksum, of {listed(unchecked)}")


def check_copied(directory: SquishDirectory, report: VerifyReport) -> None:
    """The small files that were copied along: that they are there, inside, and as they were."""
    root = os.path.realpath(directory.path)
    copied = directory.copied if isinstance(directory.copied, dict) else {}
    for place, entry in copied.items():
        report.files += 1
        try:
            path = inside(directory.path, "", place)
            if not path.exists():
                raise ValueError(f"{path} is missing; {SIDECAR} records it")
            require_checksum(require_file(path, root), entry)
            report.checksums += 1
        except (ValueError, OSError) as error:
            report.problems.append(visible(str(error)))


def check_tensor(directory: SquishDirectory, tensor: StoredTensor, report: VerifyReport) -> None:
    report.tensors += 1
    record = (directory.records or {}).get(tensor.name, {})
    recorded = record.get("files")
    if "source_dtype" in record:
        try:
            directory.source_dtype(tensor)
        except ValueError as error:
            report.problems.append(str(error))
    for file in tensor.files.values():
        report.files += 1
        report.nbytes += file.nbytes
        try:
            if recorded is not None:
                require_checksum(file.path, recorded.get(file.path.name) if isinstance(recorded, dict) else None)
                report.checksums += 1
            if file.compressed:
                file.load()
        except (ValueError, OSError) as error:
            report.problems.append(f"tensor {shorten(tensor.name)}: {visible(str(error))}")
    if tensor.kind == "nf4":
        check_scales(tensor, report)


def require_checksum(file: Path, entry: Any) -> None:
    """entry: what is recorded of the file, of any form."""
    wanted = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(wanted, str):
        raise ValueError(f"{file} has no SHA-256 in {SIDECAR}")
    with file.open("rb") as stream:
        found = sha256_of(stream)
    if found != wanted:
        raise ValueError(f"{file} is damaged: its SHA-256 is {found[:12]}..., {SIDECAR} records {wanted[:12]}...")


def check_scales(tensor: StoredTensor, report: VerifyReport) -> None:
    try:
        scales = tensor.files["__s_nf4"].load()
    except ValueError:
        return  # a problem already
    strange = np.argwhere(~np.isfinite(scales))
    if len(strange):
        row, group = (int(n) for n in strange[0])
        report.problems.append(
            f"tensor {shorten(tensor.name)}: {len(strange)} groups have no finite scale, the first in row {row}, "
            f"group {group}: {scales[row, group]}"
        )


def check_names(directory: SquishDirectory, names: set[str], report: VerifyReport) -> None:
    if lost := sorted(names - directory.tensors.keys()):
        report.problems.append(f"not in {directory.path}, but in the source: {listed(lost)}")
    if extra := sorted(directory.tensors.keys() - names):
        report.problems.append(f"in {directory.path}, but not in the source: {listed(extra)}")


def check_against(directory: SquishDirectory, name: str, w: Any, report: VerifyReport) -> None:
    tensor = directory.tensors[name]
    try:
        found = compare_with_source(w, tensor, (directory.records or {}).get(tensor.name, {}))
    except ValueError as error:
        found = str(error)
    if found:
        report.problems.append(f"tensor {shorten(name)}: {found}")
    elif tensor.kind == "nf4":
        report.requantized += 1
    else:
        report.equal += 1
