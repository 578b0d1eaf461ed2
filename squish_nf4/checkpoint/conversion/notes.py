"""What a careful reader of a conversion's report would want to know, a sentence each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from squish_nf4.checkpoint.conversion.options import Options, matching
from squish_nf4.checkpoint.conversion.report import TensorReport
from squish_nf4.checkpoint.directory.format import alike
from squish_nf4.checkpoint.messages import listed
from squish_nf4.checkpoint.values import dtype_named


def note_alike(keys: Mapping[str, str]) -> list[str]:
    """Names that a case-insensitive file system takes for one."""
    return [
        f"names that differ only by case or Unicode form: {listed(names)}; a copy of the directory to a file system "
        "that ignores the difference (the usual on macOS and Windows) would lose a tensor"
        for names in alike(keys)
    ]


def note_unused(options: Options, names: Sequence[str]) -> list[str]:
    notes = []
    for what, patterns in (("passthrough", options.passthrough), ("include", options.include)):
        used = {pattern for name in names for pattern in matching(name, patterns)}
        notes += [f"{what} {pattern!r} is part of no tensor's name" for pattern in patterns if pattern not in used]
    return notes


def note_other_group_sizes(group_size: int | None, tensors: Sequence[TensorReport]) -> list[str]:
    others = [t.name for t in tensors if group_size and t.kind == "nf4" and t.group_size != group_size]
    return (
        [f"quantized in groups of another size, for {group_size} does not divide their columns: {listed(others)}"]
        if others
        else []
    )


def notes_on(tensors: Sequence[TensorReport]) -> list[str]:
    """What the tensors' records say together: kept in a wider type than they had, or kept though not finite."""
    grown: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in tensors:
        if grew(tensor):
            grown[tensor.source_dtype, tensor.stored_dtype].append(tensor.name)
    notes = [
        f"kept in {stored}, for numpy has no {source}"
        f"{' and float16 would lose values' if stored == 'float32' else ''}: {listed(names)}"
        for (source, stored), names in grown.items()
    ]
    if names := [tensor.name for tensor in tensors if tensor.kind == "nf4" and takes_more_bits(tensor)]:
        notes.append(f"more bits in NF4 than before, for their rows are short; passthrough keeps them: {listed(names)}")
    if names := [tensor.name for tensor in tensors if not tensor.finite]:
        notes.append(f"kept with the NaN or infinity they hold: {listed(names)}")
    return notes


def grew(tensor: TensorReport) -> bool:
    return tensor.kind == "kept" and np.dtype(tensor.stored_dtype).itemsize > dtype_named(tensor.source_dtype).itemsize


def takes_more_bits(tensor: TensorReport) -> bool:
    return tensor.bits_per_weight > 8 * dtype_named(tensor.source_dtype).itemsize
