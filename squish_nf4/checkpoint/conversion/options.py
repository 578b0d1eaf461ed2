"""What decides which bytes a conversion writes. What decides only how (memory, disk) is an argument of convert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

DEFAULT_OUTLIER_THRESHOLD = 20.0

SUPER_WEIGHT = 100.0  # times the mean magnitude of its row

# The routers of mixtures of experts: a few kilobytes that decide which experts run at all.
DEFAULT_PASSTHROUGH = ("*.gate.weight", "*router*")


@dataclass(frozen=True)
class Limits:
    """How far a weight may stand out of its row before its tensor is kept.

    outlier: of max|w| / (mean|w| + 1e-8). super_weight: of max|w| / mean|w|.
    """

    outlier: float = math.inf
    super_weight: float = math.inf


@dataclass(frozen=True)
class Options:
    """Checked when made: ValueError for a wrong value, TypeError for a wrong type.

    group_size: for the tensors whose columns it divides; None, and the others: pick_group_size.
    outlier_threshold: a tensor is kept if in any row max|w| / (mean|w| + 1e-8) exceeds this; math.inf for never.
    passthrough: names, parts of names or globs of tensors to keep, besides DEFAULT_PASSTHROUGH.
    include: the same, of tensors that neither DEFAULT_PASSTHROUGH nor a large weight keeps from NF4.
    super_weight: keep a tensor if a weight exceeds SUPER_WEIGHT times the mean magnitude of its row.
    ultra: scales and kept tensors are compressed where that makes them smaller.
    """

    group_size: int | None = None
    outlier_threshold: float = DEFAULT_OUTLIER_THRESHOLD
    passthrough: Sequence[str] = ()
    include: Sequence[str] = ()
    super_weight: bool = False
    ultra: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and not isinstance(self.group_size, int):
            raise TypeError(f"group_size must be a whole number, got {self.group_size!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if not self.outlier_threshold >= 0:  # NaN too
            raise ValueError(f"outlier_threshold must be 0 or more, got {self.outlier_threshold}")
        for what in ("passthrough", "include"):
            patterns = getattr(self, what)
            if isinstance(patterns, str):
                raise TypeError(f"{what} must be a list of names, got the string {patterns!r}")
            if "" in patterns:
                raise ValueError(f"{what} holds an empty name, which is part of every name")

    def limits(self, *names: str) -> Limits:
        """Of a tensor of these names, one of which is enough to include it."""
        if any(self.includes(name) for name in names):
            return Limits()
        return Limits(self.outlier_threshold, SUPER_WEIGHT if self.super_weight else math.inf)

    def includes(self, name: str) -> bool:
        return bool(matching(name, self.include))

    def passed_through_by(self, name: str) -> str | None:
        """The pattern that keeps a tensor of this name, if one does. What the caller names goes before our defaults."""
        if named := matching(name, self.passthrough):
            return named[0]
        return None if self.includes(name) else next(iter(matching(name, DEFAULT_PASSTHROUGH)), None)

    def as_json(self) -> dict[str, Any]:
        """As squish_nf4.json and the journal hold them."""
        return {
            "group_size": self.group_size,
            "outlier_threshold": self.outlier_threshold if math.isfinite(self.outlier_threshold) else None,
            "passthrough": list(self.passthrough),
            "include": list(self.include),
            "super_weight": self.super_weight,
            "ultra": self.ultra,
        }


def matching(name: str, patterns: Iterable[str]) -> list[str]:
    """The patterns that name contains, or that match all of it as a shell glob."""
    return [pattern for pattern in patterns if pattern in name or fnmatchcase(name, pattern)]
