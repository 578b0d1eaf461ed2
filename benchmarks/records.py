"""One line of the results: a candidate in a case, with its time and its ratio to every other candidate of the case."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, PEER, LIMIT = "ours", "peer", "limit"  # roles
COLD, HOT = "cold", "hot"  # places: copies beyond the caches in rotation, or one copy again and again


@dataclass(frozen=True)
class Case:
    """What is computed. m: activations, 0 where there are none. place: cold or hot."""

    suite: str
    what: str
    dtype: str
    n: int
    d: int
    m: int = 0
    group_size: int = 64
    threads: int = 1
    place: str = COLD


@dataclass(frozen=True)
class Record:
    """How one candidate did in one case.

    ms: the median of ``rounds``. ratios: its time over that of each other candidate, the median of the ratios within
    a round. error: relative to the definition, measured before anything was timed; 0 if the bits are equal, None for
    a limit, which computes nothing.
    """

    case: Case
    candidate: str
    role: str
    ms: float
    ratios: Mapping[str, float]
    rounds: int
    error: float | None
    isa: str
    machine: str
    versions: Mapping[str, str]
    date: str

    def field(self, name: str) -> Any:
        """Of the record or of its case."""
        return getattr(self.case if name in Case.__dataclass_fields__ else self, name)


def to_json(record: Record) -> str:
    fields = dataclasses.asdict(record)
    return json.dumps({**fields.pop("case"), **fields})


def from_json(line: str) -> Record:
    fields = json.loads(line)
    case = Case(**{name: fields.pop(name) for name in Case.__dataclass_fields__})
    return Record(case=case, **fields)


def read(path: Path) -> list[Record]:
    return [from_json(line) for line in path.read_text().splitlines()]


def matching(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Those whose fields have the wanted values; a tuple wants any of its values."""
    return [
        record
        for record in records
        if all(
            record.field(name) in value if isinstance(value, tuple) else record.field(name) == value
            for name, value in wanted.items()
        )
    ]
