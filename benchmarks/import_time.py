"""What ``import squish_nf4`` costs over ``import torch``: fresh processes in turn, medians."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROGRAM = """
import time
import torch
start = time.perf_counter()
{}
print(time.perf_counter() - start)
"""


def seconds(statement: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    ours = statistics.median(seconds("import squish_nf4") for _ in range(rounds))
    print(f"import squish_nf4, after import torch: {ours * 1e3:.0f} ms (median of {rounds})")


if __name__ == "__main__":
    main()
