"""``squish-nf4 convert``: what its flags do, what it prints, and how it ends. Its usage errors are in test_cli.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import squish_nf4
from squish_nf4.checkpoint.directory.npy_writer import NpyWriter
from squish_nf4.commands.cli import app
from squish_nf4.commands.convert import bytes_of
from tests.support.directories import gaussian, save_shard
from tests.support.processes import squish, start

JOURNAL = "squish_nf4.journal"
spiky = gaussian(40, 640)
spiky[1, 3] = 1e4
TENSORS = {
    "embed.weight": gaussian(80, 640),
    "half.weight": gaussian(40, 640, dtype=torch.bfloat16),
    "head.weight": gaussian(80, 640),
    "norm.weight": torch.full((64,), 1.0 / 3),
    "odd.weight": gaussian(4, 5),
    "spiky.weight": spiky,
    "steps": torch.arange(4),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_shard(tmp_path / "model.safetensors", TENSORS)


def convert(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)])


def words(text: str) -> str:
    return " ".join(text.split())


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_flags_reach_the_library(model: Path, tmp_path: Path) -> None:
    flags = ["--ultra", "--super-weight", "--include", "spiky", "--include", "x", "--passthrough", "half"]
    result = convert(*flags, "--max-ram", "128MiB", "--min-free-gb", "0.5", model, tmp_path / "out")
    assert result.exit_code == 0, result.output
    options = {"ultra": True, "super_weight": True, "include": ["spiky", "x"], "passthrough": ["half"]}
    squish_nf4.convert(model, tmp_path / "expected", **options)
    for file in (tmp_path / "expected" / "tensors").iterdir():
        assert (tmp_path / "out" / "tensors" / file.name).read_bytes() == file.read_bytes()
    sidecar = json.loads((tmp_path / "out" / "squish_nf4.json").read_text())
    assert sidecar["options"].items() >= options.items()


def test_the_summary_says_what_large_weights_cost_what_was_compressed_and_what_is_tied(
    model: Path, tmp_path: Path
) -> None:
    text = words(convert("--ultra", model, tmp_path / "out").stdout)
    report = squish_nf4.convert(model, tmp_path / "again", ultra=True)
    assert "kept because tensors bytes more than NF4 which" in text
    assert f"outlier row (threshold 20) 1 {report.tensors[5].bytes_out / 1e3:.1f} kB" in text
    assert f"{report.outlier_cost / 1e3:.1f} kB spiky.weight" in text
    assert report.outlier_cost == report.tensors[5].bytes_out - report.tensors[5].nf4_bytes > 0
    assert f"Compressed: {report.bytes_saved / 1e3:.1f} kB less, without a loss" in text
    assert "Tied, stored once: head.weight (embed.weight)" in text
    assert "of input a second." in text


def test_a_dry_run_prints_the_exact_plan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = convert("--nf4", "--dry-run", model)
    assert result.exit_code == 0, result.output
    text = words(result.stdout)
    for row in (
        "embed.weight float32 80 x 640 NF4, groups of 32 5.00 204.8 kB",
        "half.weight bfloat16 40 x 640 NF4, groups of 32 5.00 51.2 kB",
        "head.weight float32 80 x 640 stored with embed.weight 0.00 204.8 kB 0 B",
        "norm.weight float32 64 kept: 1-D 32.00 256 B",
        "odd.weight float32 4 x 5 kept: odd number of columns (5) 32.00 80 B",
        "spiky.weight float32 40 x 640 kept: outlier row 1 (max|w| is",
        "steps int64 4 kept: int64 is not a floating-point 64.00 32 B",
        "7 tensors",
        "Nothing was written.",
    ):
        assert row in text
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dry_run_foretells_what_the_conversion_does(model: Path, tmp_path: Path) -> None:
    *planned, total = events(convert("--nf4", "--dry-run", "--json", model, tmp_path / "out").stdout)
    assert not (tmp_path / "out").exists()
    *tensors, done = events(convert("--nf4", "--json", model, tmp_path / "out").stdout)
    by_name = {tensor["name"]: tensor for tensor in tensors}
    for plan in planned:
        became = by_name[plan["name"]]
        for fact in ("kind", "reason", "shape", "group_size", "tied_to", "bytes_in", "bytes_out"):
            assert plan[fact] == became[fact], (plan["name"], fact)
        if not plan["tied_to"]:
            assert plan["bits_per_weight"] == became["bits_per_weight"]
    assert (total["tensors"], total["bytes_out"]) == (done["tensors"], done["bytes_out"])


def test_a_dry_run_finds_the_weight_that_would_be_refused(tmp_path: Path) -> None:
    file = save_shard(tmp_path / "x.safetensors", {"w": torch.tensor([[1.0, torch.nan]])})
    result = convert("--nf4", "--dry-run", file)
    assert result.exit_code == 1
    assert "row 0, column 1 is nan" in result.stderr


def test_events_are_one_json_object_a_line(model: Path, tmp_path: Path) -> None:
    result = convert("--nf4", "--json", model, tmp_path / "out")
    *tensors, done = events(result.stdout)
    assert {event["event"] for event in tensors} == {"tensor"}
    assert {event["name"] for event in tensors} == set(TENSORS)
    spiky = next(event for event in tensors if event["name"] == "spiky.weight")
    assert spiky["outlier"] > 20
    assert spiky["outlier_cost"] == spiky["bytes_out"] - spiky["nf4_bytes"]
    assert done["event"] == "done"
    assert (done["tensors"], done["nf4"], done["kept"], done["resumed"]) == (7, 3, 4, 0)
    assert done["worst"]["relative_error"] >= done["mean_relative_error"] > 0
    assert result.stderr == ""


def test_an_error_is_an_event_and_a_sentence(model: Path, tmp_path: Path) -> None:
    result = convert("--nf4", "--json", tmp_path / "absent", tmp_path / "out")
    [event] = events(result.stdout)
    assert event == {
        "event": "error",
        "message": f"{tmp_path / 'absent'} does not exist",
        "exit_code": 1,
        "resumable": False,
    }
    assert result.exit_code == 1
    assert result.stderr == f"squish-nf4: {tmp_path / 'absent'} does not exist\n"


def test_a_full_disk_ends_with_3_and_resume_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(NpyWriter, "write", full)
        result = convert("--nf4", "--json", model, out)
    assert result.exit_code == 3
    assert events(result.stdout)[-1]["resumable"] is True
    assert result.stderr.startswith("squish-nf4: No space left on device. ")
    assert "is left unfinished, with 0 of 7 tensors" in result.stderr
    assert convert("--nf4", model, out).exit_code == 1
    assert convert("--nf4", "--group-size", "64", "--resume", model, out).exit_code == 1
    assert convert("--nf4", "--resume", model, out).exit_code == 0
    assert convert("--nf4", model, out).exit_code == 1
    assert convert("--nf4", "--overwrite", model, out).exit_code == 0


def test_a_disk_without_room_ends_with_1_for_nothing_is_begun(model: Path, tmp_path: Path) -> None:
    result = convert("--nf4", "--min-free-gb", "1e9", model, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"squish-nf4: {tmp_path / 'out'} is on a disk with ")
    assert "1e+09 GB are to stay free" in result.stderr
    assert not (tmp_path / "out").exists()


def test_delete_source_removes_it(model: Path, tmp_path: Path) -> None:
    assert convert("--nf4", "--delete-source", model, tmp_path / "out").exit_code == 0
    assert not model.exists()
    assert (tmp_path / "out" / "tensors" / ".manifest_ready").exists()


# The second part file of a tensor is not opened before stdin ends; that the command waits there is said in the pipe.
HOLD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
parts = set()
def hold(event, args):
    if event == "open" and "/tensors/" in str(args[0]) and str(args[0]).endswith(".part"):
        parts.add(str(args[0]))
        if len(parts) == 2:
            os.write({pipe}, b"!")
            os.read(0, 1)
sys.addaudithook(hold)
"""


def test_control_c_ends_with_130_and_resume_goes_on(model: Path, tmp_path: Path) -> None:
    out, hook = tmp_path / "out", tmp_path / "hook"
    hook.mkdir()
    held, pipe = os.pipe()
    command = [sys.executable, "-m", "squish_nf4", "convert", "--nf4", "--min-free-gb", "0", model, out]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start(command, sitecustomize=(hook, HOLD.format(pipe=pipe)), pass_fds=[pipe], **streams) as process:
        os.close(pipe)
        assert os.read(held, 1) == b"!"
        assert len(list(out.glob("tensors/*.part"))) == 1
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()  # closes its stdin
    os.close(held)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.startswith("squish-nf4: interrupted. ")
    assert len(stderr.splitlines()) == 1
    assert "resume goes on with it" in stderr
    assert (out / JOURNAL).exists()
    assert convert("--nf4", "--resume", "--min-free-gb", "0", model, out).exit_code == 0
    assert not list(out.glob("tensors/*.part"))


def test_events_that_a_full_disk_does_not_take_end_it_with_3_and_resume_goes_on(tmp_path: Path) -> None:
    """A reader that has gone ends nothing: test_streams.py."""
    model = save_shard(tmp_path / "model.safetensors", {f"{i}": gaussian(2, 64, seed=i) for i in range(100)})
    write = os.open("/dev/full", os.O_WRONLY)
    done = squish("convert", "--nf4", "--json", model, tmp_path / "out", stdout=write)
    os.close(write)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "resume goes on with it" in done.stderr
    assert convert("--nf4", "--resume", model, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000", 1000),
        ("800MB", 800_000_000),
        ("1.5GiB", 3 * 2**29),
        ("64 MiB", 2**26),
        ("2gb", 2 * 10**9),
        ("3kB", 3000),
        ("3KiB", 3072),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, value: int) -> None:
    assert bytes_of(text) == value


@pytest.mark.parametrize("text", ["", "x", "1x", "-1", "1GiBB", "GiB", "1e9", "1,5GB"])
def test_what_is_no_size_is_refused(model: Path, tmp_path: Path, text: str) -> None:
    result = convert("--nf4", "--max-ram", text, model, tmp_path / "out")
    assert result.exit_code == 2
    assert "is no size; write 800MB or 1.5GiB" in words(result.output.replace("│", ""))


def test_resume_and_overwrite_exclude_each_other(model: Path, tmp_path: Path) -> None:
    assert convert("--nf4", "--resume", "--overwrite", model, tmp_path / "out").exit_code == 2
