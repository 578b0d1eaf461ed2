"""The suites by name: each turns options into records, and can run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from benchmarks.bench import Options
from benchmarks.records import Record
from benchmarks.suites import backward, checkpoint, codec, conversion, growth, imports, linear, model, overhead

SUITES: Mapping[str, Callable[[Options], Iterator[Record]]] = {
    "codec": codec.run,
    "linear": linear.run,
    "backward": backward.run,
    "overhead": overhead.run,
    "growth": growth.run,
    "model": model.run,
    "conversion": conversion.run,
    "checkpoint": checkpoint.run,
    "imports": imports.run,
}
