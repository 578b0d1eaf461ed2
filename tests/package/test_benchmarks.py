"""The benchmarks' own logic: what is timed is right, and what is reported is what was found. No time decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, group_sizes, limits, report, timing
from benchmarks.__main__ import main
from benchmarks.bench import WrongOutputError
from benchmarks.goals import GOALS, Goal
from benchmarks.measures import error_over, latency, neighbours, per_weight, speed
from benchmarks.records import COLD, HOT, LIMIT, OURS, PEER, Case, Record, from_json, read, to_json
from benchmarks.suites.weights import Contender, ours, products, random_weight
from squish_nf4.commands.demo.sentences import SENTENCES
from tests.support.helpers import require
from tests.support.models import require_minilm
from tests.support.processes import run_python

CASE = Case("linear", "linear", "bfloat16", 4096, 4096, 1, threads=2)
TINY = """
import sys, warnings
from benchmarks import bench
from benchmarks.__main__ import main
warnings.simplefilter("ignore")
bench.cache_bytes = lambda: 1 << 14  # a few copies of a tiny matrix are beyond it
main(sys.argv[1:])
"""
OPTIONS = ["--size", "128", "--quick", "--rounds", "1", "--patience", "0", "--dtypes", "bfloat16", "--threads", "1"]


def record(ms: float = 1.0, *, case: Case = CASE, **fields: Any) -> Record:
    given: dict[str, Any] = {"candidate": "squish_nf4", "role": OURS, "ratios": {}, "rounds": 5, "error": 0.001}
    given |= {"isa": "avx512", "machine": "a machine", "versions": {"torch": "2"}, "date": "2026-01-01"}
    return Record(case=case, ms=ms, **{**given, **fields})


def at(ms: float, **fields: Any) -> Record:
    return record(ms, case=dataclasses.replace(CASE, **fields))


# --- timing


def test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    times = timing.Times({"a": (1.0, 2.0, 30.0), "b": (1.0, 4.0, 10.0)})
    assert times.ratio("a", "b") == 1.0
    assert times.milliseconds("a") / times.milliseconds("b") == 0.5


def test_candidates_take_turns_and_each_round_begins_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW", float("inf"))
    order: list[str] = []
    calls = {name: lambda _, name=name: order.append(name) for name in ("a", "b")}
    times = timing.alternate(calls, 2)
    assert times.rounds("a") == times.rounds("b") == 2
    assert order == [*"aabb", *"aabb", *"bbaa"]  # warm-up, then a call that is not timed before each that is


def test_calls_are_numbered_so_that_each_takes_the_next_copy() -> None:
    seen: list[int] = []
    timing.alternate({"a": seen.append}, 3)
    assert seen == list(range(len(seen)))


def test_patience_ends_the_rounds_but_not_before_five() -> None:
    assert timing.alternate({"a": lambda _: None}, 50, patience=0).rounds("a") == 5


def test_a_very_slow_candidate_takes_part_in_five_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    limit = timing.VERY_SLOW
    times = timing.alternate({"a": lambda _: take(limit / 2), "b": lambda _: take(limit * 2)}, 9)
    assert (times.rounds("a"), times.rounds("b")) == (9, 5)


def test_cases_measured_together_take_different_copies() -> None:
    contender = ours(random_weight(64, 64, 32), torch.float32)
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    one, other = contender.rotating(calls), contender.rotating(calls)  # type: ignore[arg-type]
    for number in range(3):
        one(number)
        other(number)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_cold_calls_rotate_over_more_than_the_caches_hold() -> None:
    for nbytes in (1000, 9 << 20, 1 << 30):
        assert bench.copies_beyond_caches(nbytes) >= 2
        assert bench.copies_beyond_caches(nbytes) * nbytes >= 2 * bench.cache_bytes()


# --- the check before the time


@pytest.mark.parametrize("error", [0.2, float("inf"), float("nan")])
def test_wrong_output_is_refused(error: float) -> None:
    with pytest.raises(WrongOutputError, match="somebody: the relative error"):
        bench.checked("somebody", error, 0.1)


def test_bits_that_differ_are_refused() -> None:
    with pytest.raises(WrongOutputError, match="not that of the definition"):
        bench.require_equal("codec", torch.zeros(2), torch.tensor([0.0, 1e-30]))
    with pytest.raises(WrongOutputError, match="not that of the definition"):
        bench.require_equal("codec", torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_our_product_is_refused_if_it_is_wrong_and_a_peer_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    weight = random_weight(8, 64)
    x = torch.randn(2, 64)
    right = ours(weight, torch.float32, cold=False)
    wrong = Contender("wrong", PEER, weight.decoded, [lambda x: lambda: x @ weight.decoded.T * 1.5], 1e-2)
    assert [candidate.name for candidate in products([right, wrong], x, COLD)] == ["squish_nf4"]
    assert "wrong is left out" in capsys.readouterr().out
    with pytest.raises(WrongOutputError):
        products([dataclasses.replace(wrong, role=OURS)], x, COLD)


def test_peer_that_would_take_too_long_is_left_out_without_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    def never(x: torch.Tensor) -> Any:
        raise AssertionError("it was called")

    slow = Contender("slow", PEER, torch.ones(1, 2), [never], 1.0, pace=10.0)
    assert products([slow], torch.ones(1, 2), COLD) == []
    assert "about 10.0 s" in capsys.readouterr().out


# --- the limit loops


@pytest.fixture(scope="module")
def loops() -> limits.Limits:
    found = limits.limits()
    require("compiler", found is not None, "there is no C++ compiler")
    assert found is not None
    return found


@pytest.mark.builds
@pytest.mark.parametrize("streaming", [False, True])
def test_store_loop_writes_every_byte_of_whole_lines(loops: limits.Limits, streaming: bool) -> None:
    out = torch.zeros(64, 1024, dtype=torch.uint8)
    loops.store(out, streaming=streaming)
    assert bool((out == 1).all())


@pytest.mark.builds
@pytest.mark.parametrize("streaming", [False, True])
def test_read_and_store_loop_reads_every_byte_and_writes_every_byte(loops: limits.Limits, streaming: bool) -> None:
    out_bytes, ratio, line = 1 << 14, 8, 64
    source = torch.randint(0, 256, (out_bytes * ratio,), dtype=torch.uint8)
    out = torch.zeros(out_bytes, dtype=torch.uint8)
    loops.read_and_store(source, out, streaming=streaming)
    lines = source.view(-1, ratio, line)
    mixed = torch.ones_like(lines[:, 0])
    for other in range(ratio):
        mixed ^= lines[:, other]
    assert torch.equal(out, mixed.flatten())


@pytest.mark.builds
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loop_that_reads_less_than_it_writes_reads_every_byte_too(loops: limits.Limits, streaming: bool) -> None:
    source, ratio, line = torch.randint(0, 256, (1 << 13,), dtype=torch.uint8), 8, 64
    out = torch.zeros(len(source) * ratio, dtype=torch.uint8)
    loops.read_and_store(source, out, streaming=streaming)
    assert torch.equal(out, (source ^ 1).view(-1, 1, line).expand(-1, ratio, line).flatten())


def test_without_a_compiler_the_limits_are_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert limits.limits.__wrapped__() is None
    assert "no C++ compiler (no-such-compiler)" in capsys.readouterr().out


# --- records and goals


def test_record_survives_its_line_of_json() -> None:
    one = record(ratios={"dense torch": 0.5}, error=None)
    assert from_json(to_json(one)) == one


def test_speed_is_that_of_the_worst_case_against_the_fastest_rival() -> None:
    records = [record(ratios={"bitsandbytes": 0.5, "dense torch": 0.8}), at(1.0, m=2)]
    found = speed("bitsandbytes", "dense")(records)
    assert found is not None
    assert found.value == pytest.approx(1.25)
    assert "M = 1" in found.where


def test_goal_without_a_record_is_not_measured() -> None:
    assert speed("ggml")([record(ratios={"dense torch": 1.0})]) is None
    assert speed("ggml")([]) is None


def test_records_of_a_path_that_was_held_back_count_only_where_it_is_named() -> None:
    records = [record(ratios={"read": 1.0}), record(ratios={"read": 4.0}, isa="avx2")]
    best, forced = speed("read")(records), speed("read", isa="avx2")(records)
    assert best is not None
    assert best.value == 1.0
    assert forced is not None
    assert forced.value == 0.25


def test_error_is_compared_with_that_of_the_same_case() -> None:
    dense = record(candidate="dense torch", role=PEER, error=0.002)
    other = dataclasses.replace(dense, case=dataclasses.replace(CASE, m=4), error=1.0)
    found = error_over("dense torch")([record(error=0.003), dense, other])
    assert found is not None
    assert found.value == pytest.approx(1.5)


def test_step_looks_at_neighbours_alone() -> None:
    series = [at(1.0, m=1), at(1.5, m=2), at(9.0, m=8)]
    step = neighbours("m", step=1)(series)
    assert step is not None
    assert step.value == pytest.approx(1.5)
    per_m = neighbours("m", per="m")(series)
    assert per_m is not None
    assert per_m.value == pytest.approx(9.0 / 8 / (1.5 / 2))
    doubled = neighbours("m", per="m", doubled=True)([at(1.0, m=2), at(9.0, m=3), at(3.0, m=4)])
    assert doubled is not None
    assert doubled.value == 1.5
    falling = neighbours("m", down=True)([at(2.0, m=16), at(1.0, m=17)])
    assert falling is not None
    assert falling.value == 2.0


def test_time_per_weight_is_compared_with_4096_columns() -> None:
    found = per_weight((2048,))([at(1.0), at(0.5, n=2048, d=2048)])
    assert found is not None
    assert found.value == pytest.approx(2.0)


def test_latency_is_in_microseconds() -> None:
    found = latency()([record(0.004)])
    assert found is not None
    assert found.value == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("at_most", "ratio", "verdict"), [(False, 1.0, "reached"), (False, 2.0, "missed"), (True, 2.0, "reached")]
)
def test_report_says_reached_or_missed_with_the_number(at_most: bool, ratio: float, verdict: str) -> None:
    goal = Goal("speed of it", 0.8, speed("dense"), at_most=at_most)
    row = report.goal_row(goal, [record(ratios={"dense torch": ratio})])
    assert verdict in row
    assert f"| {1 / ratio:.3g} |" in row


def test_goals_have_different_names() -> None:
    assert len({goal.text for goal in GOALS}) == len(GOALS)


def test_table_gives_times_and_their_ratio_to_ours() -> None:
    rival = record(4.0, candidate="dense torch", role=PEER, ratios={"squish_nf4": 2.5}, error=0.5)
    limit = record(0.5, candidate="read", role=LIMIT, ratios={"squish_nf4": 0.25}, error=None)
    text = report.table([record(2.0), rival, limit], "m")
    assert "| squish_nf4 | **2** | 0.001 |" in text
    assert "| dense torch | 4 (2.50) | 0.5 |" in text
    assert "| read | 0.5 (0.25) |  |" in text


# --- from end to end, on matrices so small that their times mean nothing


def widened(records: Iterable[Record]) -> list[Record]:
    """As if the suites had run in full, with every peer: the goals have to find what they ask for by its names."""
    found = []
    for one in records:
        batches = (1, 2, 16, 17, 64) if one.case.m else (0,)
        for dtype, m, size, threads in product(bench.DTYPES, batches, (128, 4096, 4544), (1, 2)):
            for place, isa in product((COLD, HOT), ("avx2", "avx512_bf16")):
                swept = one.case.suite in ("growth with n", "growth with d")
                sizes = {} if swept else {"n": size, "d": size}
                case = dataclasses.replace(one.case, dtype=dtype, m=m, threads=threads, place=place, **sizes)
                ratios = {"ggml IQ4_NL": 1.0, "bitsandbytes": 1.0, **one.ratios}
                found.append(dataclasses.replace(one, case=case, isa=isa, ratios=ratios))
    return found


@pytest.mark.builds
def test_every_suite_runs_to_a_page(tmp_path: Path) -> None:
    suites = ["codec", "linear", "backward", "overhead", "growth", "conversion", "checkpoint", "imports"]
    run_python(TINY, *suites, *OPTIONS, "--output", tmp_path)
    records = read(tmp_path / "records.jsonl")
    assert {record.case.suite.split()[0] for record in records} == set(suites)
    assert all(record.error is not None for record in records if record.role == OURS and record.case.suite != "imports")
    text = (tmp_path / "README.md").read_text()
    assert "## Goals" in text
    assert "not measured" in text  # what asks for 4096 columns
    for picture in ("time-over-m.png", "growth.png"):
        assert (tmp_path / picture).is_file()
        assert picture in text
    wide = widened(records)
    unmeasured = {goal.text for goal in GOALS if goal.measure(wide) is None}
    assert {text for text in unmeasured if not text.startswith("MiniLM")} == set()


@pytest.mark.builds
def test_suite_of_the_model_runs(tmp_path: Path) -> None:
    require_minilm()
    run_python(TINY, "model", *OPTIONS, "--output", tmp_path)
    records = read(tmp_path / "records.jsonl")
    assert {"squish_nf4", "dense torch"} <= {record.candidate for record in records}
    wide = widened(records)
    assert all(goal.measure(wide) is not None for goal in GOALS if goal.text.startswith("MiniLM"))


@pytest.mark.builds
def test_forced_path_is_the_one_that_runs(tmp_path: Path) -> None:
    run_python(TINY, "overhead", *OPTIONS, "--output", tmp_path, "--isa", "scalar")
    assert {record.isa for record in read(tmp_path / "records.jsonl")} == {"scalar"}


def test_run_on_another_path_than_the_forced_one_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from squish_nf4 import _C

    _C.cpu_isa()  # chosen now, without the variable
    monkeypatch.setenv("SQUISH_NF4_ISA", "another")
    with pytest.raises(SystemExit, match="SQUISH_NF4_ISA=another, but the CPU path is"):
        main(["overhead", *OPTIONS, "--output", str(tmp_path)])


def test_group_sizes_are_tabulated(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of docs/settings.md, for one group size and four sentences."""
    require_minilm()
    group_sizes.main((64,), SENTENCES[:4])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    _, size, bits, gaussian, minilm, cosine, _ = (cell.strip() for cell in lines[2].split("|"))
    assert (size, bits, gaussian) == ("64", "4.50", "0.0920")
    assert 0.09 < float(minilm) < 0.10
    assert 0.95 < float(cosine) < 1
