"""What is said on the way: names in sentences, and how far a long task is.

A name comes out of a file that anybody may have written. Printed as it is, it could move the cursor of a terminal,
colour what follows, or look like a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a conversion, a check or a comparison is; given to the function that is its ``progress`` argument.

    Attributes:
        tensor: the name of the tensor that was begun.
        bytes_done: of a conversion, bytes of the source.
        bytes_total: what bytes_done will be at the end.
    """

    tensor: str
    bytes_done: int
    bytes_total: int


def shown(name: object) -> str:
    """A name or a path for a table or a line: as it is, or quoted and escaped if a character of it is not printable."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def brief(name: object, limit: int = 200) -> str:
    """shown, of bounded length."""
    text = shown(name)
    return text if len(text) <= limit else shorten(str(name), limit)


def visible(text: str) -> str:
    """A sentence in one line: characters that are not printable are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shorten(name: str, limit: int = 100) -> str:
    """A name for a message: quoted, control characters escaped, and of bounded length."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]} ({len(name)} characters)"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shorten(name) for name in names[:limit]) + more
