"""Two squish directories tensor by tensor: which are there, in which form, and where their bits differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from squish_nf4.checkpoint.audit.compare import Differences, compare_arrays, compare_nf4
from squish_nf4.checkpoint.directory.reader import open_directory
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.messages import Progress, shorten, visible


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both directories have, and not alike.

    Attributes:
        name: its name.
        form: how a and b store it, where that differs; values are not compared then.
        differences: of its values, a kind at a time.
    """

    name: str
    form: tuple[str, str] | None
    differences: Sequence[Differences]


@dataclass(frozen=True)
class DiffReport:
    """Where two squish directories differ.

    Attributes:
        a: one directory.
        b: the other.
        only_a: names of tensors that b does not have.
        only_b: names of tensors that a does not have.
        different: the tensors that both have, and that differ.
        equal: names of the tensors that are the same to the bit.
    """

    a: Path
    b: Path
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    different: tuple[TensorDiff, ...]
    equal: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors, to the bit."""
        return not (self.only_a or self.only_b or self.different)


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: Callable[[Progress], None] | None = None
) -> DiffReport:
    """Compare the tensors of two squish directories: names, shapes, forms and every bit of them.

    How a file is compressed, what is tied, and the files beside the tensors are no difference.

    Args:
        a, b: the directories.
        progress: called as each comparison begins.

    Raises:
        FileNotFoundError, ValueError: one of them cannot be read, as by load_npy_dir.
    """
    first, second = open_directory(a), open_directory(b)
    both = [name for name in first.tensors if name in second.tensors]
    total, done = sum(first.tensors[name].nbytes for name in both), 0
    different: list[TensorDiff] = []
    equal: list[str] = []
    for name in both:
        if progress:
            progress(Progress(name, done, total))
        with first.snapshot.held(), second.snapshot.held():
            found = diff_tensor(name, first.tensors[name], second.tensors[name])
        done += first.tensors[name].nbytes
        if found.form or found.differences:
            different.append(found)
        else:
            equal.append(name)
    return DiffReport(
        first.path,
        second.path,
        tuple(name for name in first.tensors if name not in second.tensors),
        tuple(name for name in second.tensors if name not in first.tensors),
        tuple(different),
        tuple(equal),
    )


def diff_tensor(name: str, a: StoredTensor, b: StoredTensor) -> TensorDiff:
    forms = form_of(a), form_of(b)
    if forms[0] != forms[1]:
        return TensorDiff(name, forms, ())
    try:
        if a.kind == "nf4":
            return TensorDiff(name, None, compare_nf4(a.load_nf4(), b.load_nf4(), a.shape))
        return TensorDiff(name, None, compare_arrays(a.kept(), b.kept()))
    except ValueError as error:
        raise ValueError(f"tensor {shorten(name)}: {visible(str(error))}") from error


def form_of(tensor: StoredTensor) -> str:
    """Everything that has to be the same before values can be compared."""
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    if tensor.kind == "kept":
        return f"{tensor.files['__pt'].dtype}, {shape}"
    rows, columns = tensor.matrix_shape
    return f"NF4 in groups of {tensor.group_size}, {shape}, {rows} rows of {columns}"
