"""python -m benchmarks [SUITE ...] measures; without a suite all of them. docs/benchmarks/README.md has the results.

python -m benchmarks linear --dtypes bfloat16 --threads 2 --quick
python -m benchmarks codec linear --isa avx2     in a process of its own that is held to this CPU path
python -m benchmarks --report                    measures nothing: writes table and plots from the records
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.bench import DTYPES, Options
from benchmarks.records import Record, read, to_json
from benchmarks.suites import SUITES
from benchmarks.timing import conditions
from squish_nf4 import _C

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "benchmarks" / "results"
PEERS = ROOT / "build" / "peers"  # what scripts/peers.sh installs, apart from the environment of the tests
RECORDS = "records.jsonl"
WITH_AVX2 = (("codec",), ("linear", "--batches", "1", "16"))  # quick; what the goals ask of the AVX2 path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("suites", nargs="*", choices=[*SUITES, []], metavar="SUITE", help=", ".join(SUITES))
    found.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    found.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    found.add_argument("--batches", nargs="+", type=int, help="numbers of activations, M")
    found.add_argument("--size", type=int, help="rows and columns of the matrix (4096)")
    found.add_argument("--rounds", type=int, default=21)
    found.add_argument("--patience", type=float, default=0.6, help="seconds of a case, after which no round begins")
    found.add_argument("--quick", action="store_true", help="few cases, cold ones only")
    found.add_argument("--isa", nargs="+", default=[], help="CPU paths (SQUISH_NF4_ISA), each in its own process")
    found.add_argument("--output", type=Path, default=OUTPUT, help="folder of records, table and plots")
    found.add_argument("--append", action="store_true", help="keep the records that are there")
    found.add_argument("--report", action="store_true", help="measure nothing")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / RECORDS
    if not options.report:
        if not options.append:
            file.unlink(missing_ok=True)
        if options.isa:
            for isa in options.isa:
                _in_child(isa, words)
        else:
            run(options.suites or list(SUITES), options, file)
            if not options.suites and "SQUISH_NF4_ISA" not in os.environ:
                for suites in WITH_AVX2 if _C.cpu_isa() not in ("scalar", "avx2") else ():
                    _in_child("avx2", [*suites, *_without_suites(words), "--quick"])
    if "SQUISH_NF4_ISA" not in os.environ:  # a child leaves it to its parent
        report.write(read(file), options.output)
        print(f"\n{options.output / report.TABLE}")


def run(suites: Sequence[str], options: argparse.Namespace, file: Path) -> None:
    """Measure, and append each record as soon as it is there."""
    forced = os.environ.get("SQUISH_NF4_ISA")
    if forced is not None and _C.cpu_isa() != forced:
        raise SystemExit(f"SQUISH_NF4_ISA={forced}, but the CPU path is {_C.cpu_isa()}")
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
    print(conditions())
    chosen = Options(
        dtypes=options.dtypes,
        threads=sorted(options.threads),
        batches=options.batches,
        size=options.size,
        rounds=options.rounds,
        patience=options.patience,
        quick=options.quick,
    )
    for name in suites:
        for record in SUITES[name](chosen):
            _append(file, record)


def _append(file: Path, record: Record) -> None:
    with file.open("a") as stream:
        stream.write(to_json(record) + "\n")


def _without_suites(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in SUITES]


def _in_child(isa: str, words: Sequence[str]) -> None:
    """The same in a process whose CPU path is forced; it appends to the same records."""
    kept = list(words)
    if "--isa" in kept:
        first = kept.index("--isa")
        last = next((i for i in range(first + 1, len(kept)) if kept[i].startswith("--")), len(kept))
        del kept[first:last]
    command = [sys.executable, "-m", "benchmarks", *kept, "--append"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "SQUISH_NF4_ISA": isa})


if __name__ == "__main__":
    main()
