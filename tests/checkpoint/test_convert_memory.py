"""The memory cap: one tensor of ten times as much goes through, whatever becomes of it, and so do many."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from squish_nf4.checkpoint.conversion.budget import LEAST_MAX_RAM, Budget, share_out
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.tables import write_table
from squish_nf4.checkpoint.values import BLOCK
from tests.support.directories import gaussian, raw_shard_of, save_shard
from tests.support.helpers import require
from tests.support.processes import run_python

CAP = LEAST_MAX_RAM
COLUMNS = 4096

# Anonymous memory beyond what the interpreter and the libraries hold, which a first small conversion has loaded.
PROGRAM = """
import json, re, sys, threading
from pathlib import Path
from squish_nf4.checkpoint.conversion.convert import convert

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, folder, cap, cases = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
convert(small, folder / "small")
before, peaks = anonymous(), {}
for name, (source, options) in cases.items():
    peak, done = 0, threading.Event()
    def look(_=None):
        global peak
        peak = max(peak, anonymous())
    def watch():
        while not done.wait(0.001):
            look()
    thread = threading.Thread(target=watch)
    thread.start()
    tensor = convert(source, folder / name, max_ram=cap, min_free_gb=0, progress=look, **options).tensors[0]
    done.set()
    thread.join()
    peaks[name] = (tensor.kind, tensor.stored_dtype, peak - before)
print(json.dumps(peaks))
"""


@pytest.mark.sweeps
def test_ten_times_the_cap_in_one_tensor_or_twice_in_many_stays_under_it(tmp_path: Path) -> None:
    require("linux", Path("/proc/self/status").exists(), "resident sets are read from /proc")
    small = save_shard(tmp_path / "small.safetensors", {"w": gaussian(64, 64)})
    float32 = raw_shard_of(tmp_path / "float32.safetensors", gaussian(256, COLUMNS), copies=10 * CAP // 2**22)
    bfloat16 = raw_shard_of(
        tmp_path / "bfloat16.safetensors", gaussian(256, COLUMNS, dtype=torch.bfloat16), copies=10 * CAP // 2**21
    )
    many = save_shard(
        tmp_path / "many.safetensors",
        {f"{i}": gaussian(1024, 1024, dtype=torch.bfloat16, seed=i) for i in range(64)},
    )
    cases = {
        "quantized": (str(float32), {"ultra": True}),
        "kept, wider than it was": (str(bfloat16), {"passthrough": ["w"]}),
        "found to be kept only after all was quantized": (str(float32), {"outlier_threshold": 6.0}),
        "compressed, and many of them": (str(many), {"ultra": True}),
    }
    peaks = json.loads(run_python(PROGRAM, small, tmp_path, CAP, json.dumps(cases)))
    assert {name: tuple(found[:2]) for name, found in peaks.items()} == {
        "quantized": ("nf4", "nf4"),
        "kept, wider than it was": ("kept", "float32"),
        "found to be kept only after all was quantized": ("kept", "float32"),
        "compressed, and many of them": ("nf4", "nf4"),
    }
    for name, (_, _, peak) in peaks.items():
        assert 2**20 < peak < CAP, f"{name}: {peak / 2**20:.0f} MiB"


def test_a_table_is_written_without_becoming_one_text(tmp_path: Path) -> None:
    table = {f"tensor.{i}": {"reason": None, "shape": [4, 8]} for i in range(10_000)}
    tracemalloc.start()
    write_table(tmp_path / "table.json", table, tmp_path / "part")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "table.json").read_text() == json.dumps(table, indent=2)
    assert peak < 2**18


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
@pytest.mark.parametrize("max_ram", [LEAST_MAX_RAM, 2**28, 2**30])
def test_the_stretches_that_are_there_at_once_fit_into_a_quarter_of_the_cap(max_ram: int, threads: int) -> None:
    budget = share_out(max_ram, COLUMNS, threads)
    assert 1 <= budget.workers <= threads
    assert budget.stretch >= BLOCK
    assert 2 * (budget.ahead + 1) * 12 * budget.stretch + budget.workers * 8 * BLOCK <= max_ram // 4


def test_more_memory_is_not_used_than_is_good_for_something() -> None:
    assert share_out(2**40, COLUMNS, 4) == Budget(2**21, 4)


def test_a_long_row_takes_fewer_threads_and_at_last_too_much() -> None:
    assert share_out(2**28, 300_000, 8).workers < 8
    assert share_out(2**28, 300_000, 8).stretch >= 300_000
    with pytest.raises(ValueError, match=r"a row of 10000000 columns .* takes max_ram of \d+ MiB, got 256 MiB"):
        share_out(2**28, 10**7, 8)


def test_the_cap_that_the_refusal_of_a_long_row_asks_for_is_enough() -> None:
    with pytest.raises(ValueError, match=r"max_ram of") as refused:
        share_out(2**28, 10**7, 1)
    wanted = int(str(refused.value).split("max_ram of ")[1].split(" MiB")[0])
    assert share_out(wanted * 2**20, 10**7, 1).stretch == 10**7


@pytest.mark.parametrize(("max_ram", "columns"), [(2**26, 209_715), (2**30, 3_355_443)])
def test_the_longest_rows_are_as_long_as_the_documentation_says(max_ram: int, columns: int) -> None:
    assert share_out(max_ram, columns, 8) == Budget(columns, 1)
    with pytest.raises(ValueError, match=f"a row of {columns + 1} columns"):
        share_out(max_ram, columns + 1, 8)


def test_a_cap_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = save_shard(tmp_path / "x.safetensors", {"w": gaussian(2, 64)})
    with pytest.raises(ValueError, match="max_ram must be at least 64 MiB, got 1 MiB"):
        convert(file, tmp_path / "out", max_ram=2**20)
    assert not (tmp_path / "out").exists()


TENSORS = {
    "w": gaussian(700, 96),
    "long": gaussian(3, 50_000, seed=1),
    "narrow": gaussian(40_000, 2, seed=2),
    "half": gaussian(300, 4, 64, dtype=torch.bfloat16, seed=3),
    "double": gaussian(500, 256, dtype=torch.float64, seed=4),
    "kept": gaussian(100_001, seed=5),
    "outlier": torch.cat([gaussian(900, 96), torch.eye(1, 96) * 1e4]),
}


@pytest.mark.parametrize("stretch", [50_000, 65_536, 2**21])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_tiles_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int, workers: int
) -> None:
    source = save_shard(tmp_path / "x.safetensors", TENSORS)
    convert(source, tmp_path / "expected")
    monkeypatch.setattr("squish_nf4.checkpoint.conversion.convert.share_out", lambda *_: Budget(stretch, workers))
    convert(source, tmp_path / "out")
    for file in sorted((tmp_path / "expected").rglob("*.*")):
        if file.name != "stats.json" and file.is_file():
            assert (tmp_path / "out" / file.relative_to(tmp_path / "expected")).read_bytes() == file.read_bytes()
