"""What decides which bytes a conversion writes. What decides only how (memory, disk) is an argument of convert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from inspect import signature
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


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options of convert, dry_run and quantize_tensor, each given to them by its name.

    Attributes:
        group_size: for the tensors whose columns it divides; the others, and all if it is None, take pick_group_size.
        outlier_threshold: a tensor is kept if in any row max|w| / (mean|w| + 1e-8) exceeds this; math.inf for never.
        passthrough: names, parts of names or globs of tensors to keep, besides the routers of mixtures of experts.
        include: the same, of tensors to quantize though they are such routers or hold a large weight.
        super_weight: keep a tensor too if max|w| / mean|w| of a row exceeds 100.
        ultra: store scales and kept tensors compressed where that makes them smaller.

    Raises:
        ValueError: a value is wrong.
        TypeError: its type is.
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

    @classmethod
    def named(cls, function: Callable[..., Any], options: Mapping[str, Any]) -> ConvertOptions:
        """The options that a function was called with. TypeError: it was given one that there is not."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            arguments = signature(function).parameters.values()
            known += [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
            raise TypeError(f"{function.__name__}: there is no option {unknown[0]!r}; there are {', '.join(known)}")
        return cls(**options)

    def limits(self, *names: str) -> Limits:
        """The limits of a tensor of these names, one of which is enough to include it."""
        if any(self.includes(name) for name in names):
            return Limits()
        return Limits(self.outlier_threshold, SUPER_WEIGHT if self.super_weight else math.inf)

    def includes(self, name: str) -> bool:
        """Whether a tensor of this name goes to NF4 though it is a router or holds a large weight."""
        return bool(matching(name, self.include))

    def passed_through_by(self, name: str) -> str | None:
        """The pattern that keeps a tensor of this name, if one does. What the caller names goes before our defaults."""
        if named := matching(name, self.passthrough):
            return named[0]
        return None if self.includes(name) else next(iter(matching(name, DEFAULT_PASSTHROUGH)), None)

    def as_json(self) -> dict[str, Any]:
        """The form in which squish_nf4.json and the journal hold the options."""
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
