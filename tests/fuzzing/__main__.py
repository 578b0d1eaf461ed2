"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzzing``, which ``make fuzz`` calls once atheris is there.

Each target runs in a process of its own. It starts from the committed seeds and from what earlier runs found, in
build/fuzz/corpus; an input that breaks a promise is written to build/fuzz/crashes, and ends the run. ``--keep`` then
adds to the committed seeds those inputs that take a way through the readers that no seed takes; it needs no atheris.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support import ROOT

READERS = str(ROOT / "squish_nf4" / "checkpoint")
SEEDS = Path(__file__).parent / "corpus"
BUILD = ROOT / "build" / "fuzz"
LONGEST = 2048  # bytes of an input
NAMES = ("npy_header", "npy_file", "zst_file", "directory")

Way = set[tuple[str, int, int]]  # steps from line to line: (file, from, to)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--target", choices=NAMES, help="only this one")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--keep", action="store_true", help="make seeds of what was found")
    parser.add_argument("--here", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # in the process of one target
    options = parser.parse_args()
    if options.here is not None:
        fuzz(options.target, options.here)
        return
    for name in [options.target] if options.target else NAMES:
        if options.keep:
            print(f"== {name}: {keep(name)} new seeds")
        else:
            print(f"== {name}: {options.seconds} seconds", flush=True)
            command = [sys.executable, "-m", "tests.fuzzing", "--target", name, "--here"]
            subprocess.run([*command, *arguments(name, options.seconds)], cwd=ROOT, check=True)


def arguments(name: str, seconds: int) -> list[str]:
    """Of libFuzzer."""
    found, crashes = BUILD / "corpus" / name, BUILD / "crashes" / name
    for folder in (found, crashes, SEEDS / name):
        folder.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_len={LONGEST}", "-rss_limit_mb=4096", f"-max_total_time={seconds}"]
    return [*limits, f"-artifact_prefix={crashes}/", "-print_final_stats=1", str(found), str(SEEDS / name)]


def fuzz(name: str, arguments: list[str]) -> None:
    """atheris counts the branches of the readers alone; it has to see their import."""
    import atheris
    import numpy  # noqa: F401  (not counted)
    import torch  # noqa: F401

    with atheris.instrument_imports(include=["squish_nf4.checkpoint"]):
        from tests.fuzzing.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def keep(name: str) -> int:
    """How many inputs became seeds: the smallest first, each for a step that none before it takes."""
    folder = SEEDS / name
    folder.mkdir(parents=True, exist_ok=True)
    taken: Way = set()
    for seed in sorted(folder.iterdir()):
        taken |= way_of(name, seed.read_bytes())
    kept = 0
    for data in sorted((file.read_bytes() for file in (BUILD / "corpus" / name).glob("*")), key=lambda d: (len(d), d)):
        way = way_of(name, data)
        if way - taken:
            taken |= way
            (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
            kept += 1
    return kept


def way_of(name: str, data: bytes) -> Way:
    """The steps that the readers take for an input."""
    from tests.fuzzing.targets import TARGETS

    way: Way = set()
    last: dict[FrameType, int] = {}

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(READERS):
            return None
        if event == "line":
            way.add((frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        return step

    sys.settrace(step)
    try:
        TARGETS[name](data)
    finally:
        sys.settrace(None)
    return way


if __name__ == "__main__":
    main()
