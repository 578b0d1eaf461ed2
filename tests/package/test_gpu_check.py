"""make gpu-check as far as a machine without a GPU allows: its stages, its reports, the records that are committed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from scripts import gpu_benchmark, gpu_check
from scripts.gpu_check import Result, Stage
from tests.support import ROOT
from tests.support.processes import run

SCRIPT = ROOT / "scripts" / "gpu_check.py"
RECORDS = sorted((ROOT / "docs" / "benchmarks" / "cuda").glob("*.json"))


@pytest.mark.sweeps
def test_a_dry_run_goes_through_what_needs_no_gpu(tmp_path: Path) -> None:
    done = run([sys.executable, SCRIPT, "--dry-run", "--output", tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {stage["stage"]: stage["state"] for stage in whole["stages"]} == {"tests": "passed", "benchmark": "passed"}
    assert "tests collected" in whole["stages"][0]["detail"]
    page = (tmp_path / "gpu-check.md").read_text()
    assert page.count("NOT MEASURED") == len(gpu_benchmark.goals([])) > 20
    assert page.strip() in done.stdout


def test_without_a_gpu_it_says_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    said = capsys.readouterr().out
    assert "no GPU was found" in said
    assert "--dry-run" in said


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_or_hangs_or_lacks_something_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [
        Stage("fails", program("print('why it failed'); raise SystemExit(3)"), 60),
        Stage("hangs", program("import signal; print('so far', flush=True); signal.pause()"), 2),
        Stage("lacks a tool", program(""), 60, tool="no-such-tool"),
        Stage("lacks a module", program(""), 60, modules=("sys", "no_such_module")),
        Stage("passes", program("print('a line'); print('the last line')"), 60),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda output, dry: found)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--output", str(tmp_path)])
    assert gpu_check.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[: len(found)]]
    assert [(line["stage"], line["state"]) for line in lines] == [
        ("fails", "failed"),
        ("hangs", "timed out"),
        ("lacks a tool", "skipped"),
        ("lacks a module", "skipped"),
        ("passes", "passed"),
    ]
    assert lines[0]["detail"] == "why it failed"
    assert lines[2]["detail"] == "no-such-tool is not on the PATH"
    assert lines[3]["detail"] == "no_such_module not installed"
    assert lines[4]["detail"] == "the last line"


def test_nothing_runs_after_a_build_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [Stage("build", program("raise SystemExit(1)"), 60), Stage("next", program(""), 60)]
    monkeypatch.setattr(gpu_check, "stages", lambda output, dry: found)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--output", str(tmp_path)])
    assert gpu_check.main() == 1
    assert json.loads((tmp_path / "gpu-check.json").read_text())["stages"][1]["state"] == "failed"


def test_every_file_of_the_cuda_tests_is_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those in which nothing is asked of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    named = {Path(word).name for stage in gpu_check.stages(tmp_path, dry=False) for word in stage.command}
    files = (ROOT / "tests" / "cuda").glob("test_*.py")
    on_a_gpu = {
        path.name for path in files if re.search(r"gpu: Gpu|\.cuda\(|\"cuda:0\"|device: torch", path.read_text())
    }
    assert len(on_a_gpu) > 5
    assert on_a_gpu <= named


def test_all_stages_together_have_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hangs = program("import signal; signal.pause()")
    monkeypatch.setattr(gpu_check, "stages", lambda output, dry: [Stage("first", hangs, 60), Stage("next", hangs, 60)])
    monkeypatch.setattr(gpu_check, "WHOLE_LIMIT", 2)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--output", str(tmp_path)])
    assert gpu_check.main() == 1
    first, second = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
    assert (first["state"], second["state"]) == ("timed out", "timed out")
    assert second["detail"] == "not run, for the 2 seconds of all stages are over"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_page_of_a_record_is_made_from_its_figures(path: Path) -> None:
    whole = json.loads(path.read_text())
    results = [Result(**stage) for stage in whole["stages"]]
    assert path.with_suffix(".md").read_text() == gpu_check.report(whole["machine"], results, whole["records"])
    assert path.stat().st_size < 1_000_000
