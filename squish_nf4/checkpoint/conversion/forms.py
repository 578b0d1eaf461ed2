"""What a journal and squish_nf4.json must hold before a conversion acts on them: both are files that can be damaged.

Only forms are checked here, and that the parts of one file agree; recovery.py sees whether they are true of the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from squish_nf4.checkpoint.conversion.journal import VERSION, Journal, way_out
from squish_nf4.checkpoint.values import dtype_named

Form = Callable[[Any], bool]  # whether a value has it
LARGEST = 2**63


def is_text(value: Any) -> bool:
    """A string that can be part of a file's name: no NUL, no lone surrogate."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_time(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def is_number(value: Any) -> bool:
    """A finite number that is not negative."""
    return is_count(value) or (type(value) is float and 0 <= value < math.inf)


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and math.prod(value) < LARGEST


def is_dtype(value: Any) -> bool:
    try:
        return is_text(value) and bool(dtype_named(value))
    except ValueError:
        return False


def is_stored_dtype(value: Any) -> bool:
    try:
        return is_text(value) and (value == "nf4" or bool(np.dtype(value).itemsize))
    except TypeError:
        return False


def maybe(form: Form) -> Form:
    return lambda value: value is None or form(value)


def each(form: Form) -> Form:
    """A list of values of this form."""
    return lambda value: isinstance(value, list) and all(map(form, value))


def named(form: Form) -> Form:
    """An object of any names, and values of this form."""
    return lambda value: isinstance(value, dict) and all(map(form, value.values()))


def holding(forms: Mapping[str, Form], **optional: Form) -> Form:
    """An object that holds what forms name, and may hold more."""

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not forms.keys() <= value.keys():
            return False
        return all(form(value[name]) for name, form in {**forms, **optional}.items() if name in value)

    return fits


STORED = holding({"bytes": is_count, "sha256": is_text}, plain_bytes=is_count)
TENSOR = holding(
    {
        "kind": lambda value: value in ("nf4", "kept"),
        "reason": maybe(is_text),
        "source_dtype": is_dtype,
        "stored_dtype": is_stored_dtype,
        "shape": is_shape,
        "group_size": maybe(lambda value: is_count(value) and value > 0),
        "relative_error": is_number,
        "outlier": maybe(is_number),
        "nf4_bytes": maybe(is_count),
        "finite": lambda value: isinstance(value, bool),
        "tied_to": maybe(is_text),
        "files": named(STORED),
    }
)
HEADER = holding(
    {
        "journal": is_count,
        "writer": is_text,
        "options": lambda value: isinstance(value, dict),
        "shards": named(holding({"bytes": is_count, "mtime_ns": is_time, "header_sha256": is_text})),
        "small_files": named(holding({"bytes": is_count, "mtime_ns": is_time})),
        "tensors": named(
            lambda value: (
                isinstance(value, list)
                and len(value) == 4
                and all(form(part) for form, part in zip((is_text, is_dtype, is_shape, is_count), value, strict=True))
            )
        ),
        "tied": named(is_text),
    },
    replaces=maybe(each(is_text)),
    identities=named(each(lambda value: type(value) is int)),
)
FACTS: dict[str, Form] = {
    "tensor": holding({"tensor": is_text, "parts": named(is_text), "record": TENSOR}),
    "copied": holding({"copied": is_text, "parts": named(is_text), "record": STORED}),
    "removed": holding({"removed": is_text}),
    "copies": holding({"copies": each(is_text)}),
    "cleared": holding({"cleared": lambda value: value is True}),
}
WRITTEN = holding({"tensors": named(holding({"files": named(STORED)})), "copied": named(STORED)})


def open_journal(path: Path) -> Journal:
    """The journal of an unfinished conversion.

    Raises:
        ValueError: it is damaged, or another version's.
        BlockingIOError: another process has it open.
        FileExistsError: it is a link, or no file.
    """
    journal = Journal(path)
    try:
        if not is_header(journal.header):
            raise damaged(journal, 1)
        for line, fact in enumerate(journal.facts, 2):
            if not is_fact(fact, journal.header):
                raise damaged(journal, line)
    except BaseException:
        journal.close()
        raise
    return journal


def damaged(journal: Journal, line: int) -> ValueError:
    return ValueError(
        f"{journal.path} is damaged, or another version's: its line {line} is not understood; {way_out(journal.path)}"
    )


def is_header(header: Mapping[str, Any]) -> bool:
    if not HEADER(header) or header["journal"] != VERSION:
        return False
    tied, tensors = header["tied"], header["tensors"]
    shards_known = all(entry[0] in header["shards"] for entry in tensors.values())
    return shards_known and all({name, owner} <= tensors.keys() and owner not in tied for name, owner in tied.items())


def is_fact(fact: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    kinds = [kind for kind in FACTS if kind in fact]
    if len(kinds) != 1 or not FACTS[kinds[0]](fact):
        return False
    if "removed" in fact:
        return fact["removed"] in header["shards"]
    if "copied" in fact:
        return list(fact["parts"]) == [fact["copied"]]
    return "cleared" in fact or "copies" in fact or (fact["tensor"] in header["tensors"] and is_of_tensor(fact, header))


def is_of_tensor(fact: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether a tensor's record agrees with its files, with itself, and with what the header says of it."""
    record = fact["record"]
    _, dtype, shape, _ = header["tensors"][fact["tensor"]]
    return bool(
        fact["parts"].keys() == record["files"].keys()
        and (record["source_dtype"], record["shape"]) == (dtype, shape)
        and (record["kind"] == "nf4") == (record["group_size"] is not None) == (record["stored_dtype"] == "nf4")
        and record["tied_to"] == header["tied"].get(fact["tensor"])
        and bool(record["files"]) == (record["tied_to"] is None)
    )
