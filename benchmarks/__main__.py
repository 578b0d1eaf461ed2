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
from benchmarks.records import read, to_json
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
    found.add_argument("--patience", type=float, default=1.0, help="seconds of a case, after which no round begins")
    found.add_argument("--quick", action="store_true", help="few cases, cold ones only")
    found.add_argument("--isa", nargs="+", default=[], help="CPU paths (SQUISH_NF4_ISA), each in its own process")
    found.add_argument("--output", type=Path, default=OUTPUT, help="folder of records, table and plots")
    found.add_argument("--append", action="store_true", help="keep the records that are there")
    found.add_argument("--report", action="store_true", help="measure nothing: write the page once more")
    found.add_argument("--no-page", action="store_true", help="records only")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.report:
        measure_all(options)
    if not options.no_page:
        report.write(read(options.output / RECORDS), options.output)
        print(f"\n{options.output / report.TABLE}")


def measure_all(options: argparse.Namespace) -> None:
    """The suites, here or on the paths asked for; without either, all of them and then those of the AVX2 path."""
    if not options.append:
        (options.output / RECORDS).unlink(missing_ok=True)
    if options.isa:
        for isa in options.isa:
            in_child(isa, options, options.suites)
        return
    run(options.suites or list(SUITES), options)
    if not options.suites and _C.cpu_isa().startswith("avx512"):
        for suites in WITH_AVX2:
            in_child("avx2", options, suites, "--quick")


def run(suites: Sequence[str], options: argparse.Namespace) -> None:
    """Measure in this process, and append each record as soon as it is there."""
    forced = os.environ.get("SQUISH_NF4_ISA")
    if forced is not None and _C.cpu_isa() != forced:
        raise SystemExit(f"SQUISH_NF4_ISA={forced}, but the CPU path is {_C.cpu_isa()}")
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
    print(conditions())
    chosen = Options(**{name: getattr(options, name) for name in Options.__dataclass_fields__})
    for name in suites:
        for record in SUITES[name](chosen):
            with (options.output / RECORDS).open("a") as stream:
                stream.write(to_json(record) + "\n")


def in_child(isa: str, options: argparse.Namespace, suites: Sequence[str], *more: str) -> None:
    """The suites in a process whose CPU path is forced; it appends to the same records."""
    words = [*suites, *more, "--append", "--no-page", "--output", str(options.output)]
    for name in ("dtypes", "threads", "batches", "size", "rounds", "patience"):
        value = getattr(options, name)
        if value is not None and f"--{name}" not in words:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    words += ["--quick"] if options.quick else []
    command = [sys.executable, "-m", "benchmarks", *words]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "SQUISH_NF4_ISA": isa})


if __name__ == "__main__":
    main()
