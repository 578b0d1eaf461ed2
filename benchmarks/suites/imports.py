"""What ``import squish_nf4`` costs after ``import torch``, in fresh processes."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.bench import Options, versions
from benchmarks.records import OURS, Case, Record
from benchmarks.timing import machine
from squish_nf4 import _C

WHAT = "import squish_nf4"
PROGRAM = """
import time
import torch
start = time.perf_counter()
import squish_nf4
print(time.perf_counter() - start)
"""


def run(options: Options) -> Iterator[Record]:
    rounds = 3 if options.quick else 7
    milliseconds = [1e3 * _seconds() for _ in range(rounds)]
    print(f"\n{WHAT}, after import torch: {statistics.median(milliseconds):.0f} ms")
    case = Case("imports", WHAT, "", 0, 0, group_size=0, threads=1, place="fresh process")
    yield Record(
        case=case,
        candidate="squish_nf4",
        role=OURS,
        ms=statistics.median(milliseconds),
        ratios={},
        rounds=rounds,
        error=None,
        isa=_C.cpu_isa(),
        machine=machine(),
        versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _seconds() -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return float(done.stdout)
