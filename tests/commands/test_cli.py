"""The command line: every command and flag, in this process where that is enough, and as a user starts it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import squish_nf4
from squish_nf4.commands import print_convert, terminal
from squish_nf4.commands.cli import app
from tests.support.directories import gaussian, save_shard
from tests.support.processes import assert_one_sentence, run, squish, start

COMMANDS = {"convert", "demo", "diff", "doctor", "export", "inspect", "verify"}


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def said(result: Result) -> str:
    """What a user reads, with the line breaks and the frames of a usage error taken out."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    spiky = gaussian(4, 64)
    spiky[1, 3] = 1e4
    tensors = {
        "up.weight": gaussian(8, 64),
        "down.weight": gaussian(4, 48, seed=8),
        "spiky.weight": spiky,
        "odd.weight": gaussian(4, 5),
        "norm.weight": gaussian(64),
        "steps": torch.arange(4),
    }
    save_shard(tmp_path / "model" / "model.safetensors", tensors)
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_help_lists_the_commands_that_exist_and_no_other() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert set(re.findall(r"^│ (\w+) ", result.output, re.MULTILINE)) == COMMANDS
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == COMMANDS  # type: ignore[union-attr]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"squish-nf4 {command}" in result.output or f"root {command}" in result.output


def test_without_arguments_it_shows_its_help() -> None:
    assert "Usage:" in invoke().output


def test_version() -> None:
    assert invoke("--version").output == f"squish-nf4 {squish_nf4.__version__}\n"


@pytest.mark.parametrize("by_name", [False, True], ids=["IN OUT", "--model-dir --output"])
def test_convert_writes_what_the_library_writes(model: Path, tmp_path: Path, by_name: bool) -> None:
    out = tmp_path / "out"
    paths = ("--model-dir", model, "--output", out) if by_name else (model, out)
    result = invoke("convert", "--nf4", *paths)
    assert result.exit_code == 0, result.output
    squish_nf4.convert(model, tmp_path / "expected")
    written = {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
    assert written == {file.relative_to(tmp_path / "expected") for file in (tmp_path / "expected").rglob("*.*")}
    for file in written - {Path("stats.json")}:  # it holds the time it took
        assert (out / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_convert_summary_says_what_was_done_and_kept_and_why(model: Path, tmp_path: Path) -> None:
    result = invoke("convert", "--nf4", model, tmp_path / "out", "--passthrough", "up", "--passthrough", "no-such")
    text = " ".join(result.output.split())
    assert "NF4, groups of 16 1 768 B" in text  # down.weight: 4 x 48 float32
    assert "kept exactly 5" in text
    assert "all 6" in text
    for reason in (
        "outlier row (threshold 20) 1",
        "on passthrough (up) 1",
        "odd number of columns 1",
        "1-D 1",
        "int64",
    ):
        assert reason in text
    assert "Relative error: mean 0.0" in text
    assert "worst 0.0" in text
    assert "(down.weight)" in text
    assert "Copied along: config.json" in text
    assert "Note: passthrough 'no-such' is part of no tensor's name" in text
    assert "Done in" in text


def test_convert_options_reach_the_library(model: Path, tmp_path: Path) -> None:
    result = invoke("convert", "--nf4", model, tmp_path / "out", "--outlier-threshold", "inf", "--group-size", "8")
    assert result.exit_code == 0, result.output
    assert "NF4, groups of 8" in result.output
    assert "outlier" not in result.output
    packed, scales = squish_nf4.quantize_nf4(load_file(model / "model.safetensors")["spiky.weight"], 8)
    returned = squish_nf4.load_npy_dir(tmp_path / "out")["spiky.weight"]
    assert torch.equal(returned, squish_nf4.dequantize_nf4(packed, scales, 8))


def test_convert_takes_a_single_file(model: Path, tmp_path: Path) -> None:
    result = invoke("convert", "--nf4", model / "model.safetensors", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "config.json").exists()


WRONG_USAGE = {
    "without --nf4": (["IN", "OUT"], "say what to convert to: --nf4 or --ultra"),
    "no OUT": (["--nf4", "IN"], "OUT: missing; write either IN OUT or --model-dir IN --output OUT"),
    "nothing": (["--nf4"], "IN: missing"),
    "only --output": (["--nf4", "--output", "OUT"], "IN: missing"),
    "only --model-dir": (["--nf4", "--model-dir", "IN"], "OUT: missing"),
    "IN twice": (["--nf4", "IN", "OUT", "--model-dir", "IN"], "given twice, as IN (IN) and as --model-dir (IN)"),
    "OUT twice": (["--nf4", "IN", "OUT", "--output", "X"], "given twice, as OUT (OUT) and as --output (X)"),
    "mixed": (["--nf4", "IN", "--model-dir", "X", "--output", "OUT"], "given twice, as IN (IN) and as --model-dir (X)"),
    "threshold below 0": (["--nf4", "IN", "OUT", "--outlier-threshold", "-1"], "--outlier-threshold"),
    "threshold nan": (["--nf4", "IN", "OUT", "--outlier-threshold", "nan"], "--outlier-threshold"),
    "threshold no number": (["--nf4", "IN", "OUT", "--outlier-threshold", "x"], "--outlier-threshold"),
    "group size 0": (["--nf4", "IN", "OUT", "--group-size", "0"], "--group-size"),
    "unknown flag": (["--nf4", "IN", "OUT", "--utlra"], "No such option"),
    "three paths": (["--nf4", "IN", "OUT", "MORE"], "unexpected extra argument"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_says_what_is_wrong_and_ends_with_2(name: str) -> None:
    args, message = WRONG_USAGE[name]
    result = invoke("convert", *args)
    assert result.exit_code == 2, result.output
    assert message in said(result)


def test_errors_end_with_1_and_a_sentence_on_stderr(model: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    bad = save_shard(tmp_path / "bad.safetensors", {"w": torch.tensor([[1.0, math.nan]])})
    for source, target, message in (
        (tmp_path / "absent", tmp_path / "out", "does not exist"),
        (model, full, "is not empty"),
        (model, model / "inside", "lies inside the source"),
        (bad, tmp_path / "out", "row 0, column 1 is nan"),
    ):
        result = invoke("convert", "--nf4", source, target)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("squish-nf4: ")
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    """Rich would take [bold] for markup."""
    save_shard(tmp_path / "m.safetensors", {"[bold]w": gaussian(2, 64), "[red]x": gaussian(4)})
    result = invoke("convert", "--nf4", tmp_path / "m.safetensors", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "[bold]w" in result.output
    assert "[red]x" in result.output


def test_as_a_process_without_a_terminal_it_is_plain_text(model: Path, tmp_path: Path) -> None:
    done = squish("convert", "--nf4", model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar
    assert "\x1b" not in done.stdout
    assert "kept exactly" in done.stdout


def test_as_a_process_an_error_is_one_sentence(tmp_path: Path) -> None:
    assert_one_sentence(squish("convert", "--nf4", tmp_path / "absent", tmp_path / "out"), "absent does not exist")


def test_a_stream_that_knows_only_ascii_does_not_stop_it(model: Path, tmp_path: Path) -> None:
    done = squish("convert", "--nf4", model, tmp_path / "öut", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "kept exactly" in done.stdout


@pytest.mark.parametrize(
    ("hidden", "args", "message"),
    [
        ("typer", ["--help"], "the command line needs typer, which is not installed; type: pip install typer rich"),
        ("rich", ["doctor"], "the command line needs rich, which is not installed; type: pip install typer rich"),
        ("safetensors", ["convert", "--nf4", "IN", "OUT"], "needs the package safetensors, which is not installed"),
    ],
)
def test_a_missing_package_is_named_in_one_sentence(hidden: str, args: list[str], message: str, tmp_path: Path) -> None:
    assert_one_sentence(squish(*args, without=(tmp_path, [hidden])), message)


MISFIT = """
import torch
torch.__version__ = "2.99.0"
"""


def test_a_library_of_another_torch_is_one_sentence(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "squish_nf4", "doctor"], sitecustomize=(tmp_path, MISFIT))
    assert_one_sentence(done, "squish-nf4: squish_nf4 was built for torch", "torch 2.99.0 is installed; rebuild it")
    imported = run([sys.executable, "-c", "import squish_nf4"], sitecustomize=(tmp_path, MISFIT))
    assert "ImportError: squish_nf4 was built for torch" in imported.stderr  # not SystemExit: a program can catch it


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1.0 MB"), (1234, "1.2 kB"), (90_900_000, "90.9 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_read_well(value: float, text: str) -> None:
    assert terminal.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (0.9999, "1.0 s"), (9.94, "9.9 s"), (61, "61 s"), (125, "2 min 5 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("outlier row 7 (max|w| is 31.7 times mean|w|, threshold 20)", "outlier row (threshold 20)"),
        ("odd number of columns (13)", "odd number of columns"),
        ("on passthrough (lm_head)", "on passthrough (lm_head)"),
        ("1-D", "1-D"),
    ],
)
def test_reasons_that_differ_only_in_numbers_are_one_line(reason: str, group: str) -> None:
    assert print_convert.kind_of_reason(reason) == group


def test_on_a_terminal_it_shows_progress_and_then_takes_it_away(model: Path, tmp_path: Path) -> None:
    """A pseudo-terminal, read to its end."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "squish_nf4", "convert", "--nf4", model, tmp_path / "out"]
    with start(command, environment={"TERM": "xterm-256color"}, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        shown = b"".join(iter(lambda: read(master), b"")).decode()
        assert process.stdout is not None
        assert "kept exactly" in process.stdout.read().decode()
    os.close(master)
    assert process.returncode == 0
    assert "\x1b[" in shown  # it moved the cursor
    assert "━" in shown  # a bar


def read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""
