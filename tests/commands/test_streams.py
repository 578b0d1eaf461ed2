"""The command line where nobody reads what it prints: streams that are closed, broken off or full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from squish_nf4 import convert, load_npy_dir
from tests.support.directories import gaussian, save_shard
from tests.support.processes import run, squish


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("out", "other")):
        w = {"a.weight": gaussian(8, 64, seed=seed), "b": gaussian(4, seed=seed)}
        convert(save_shard(tmp_path / "model.safetensors", w), tmp_path / name)
    return tmp_path


def with_closed(redirections: str, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "squish_nf4", *command]
    return run(["sh", "-c", f'exec "$@" {redirections}', "sh", *words], cwd=folder)


@pytest.mark.parametrize(
    ("command", "status"), [("--version", 0), ("doctor", 0), ("inspect --json out", 0), ("diff out other", 1)]
)
def test_a_closed_stdout_changes_no_exit_code(folder: Path, command: str, status: int) -> None:
    done = with_closed(">&-", folder, *command.split())
    assert (done.returncode, done.stderr) == (status, "")


def test_an_error_is_a_sentence_though_stdout_is_closed(folder: Path) -> None:
    done = with_closed(">&-", folder, "diff", "out", "absent")
    assert (done.returncode, done.stderr) == (2, "squish-nf4: absent is not a directory\n")


def test_what_is_printed_to_closed_streams_goes_into_no_file(folder: Path) -> None:
    """The first file that is opened would else get the number of one of them."""
    assert with_closed(">&- 2>&-", folder, "convert", "--nf4", "--json", "model.safetensors", "new").returncode == 0
    new, other = load_npy_dir(folder / "new"), load_npy_dir(folder / "other")  # of the same checkpoint
    assert all(new[name].equal(tensor) for name, tensor in other.items())


def without_a_reader(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    read, write = os.pipe()
    os.close(read)
    try:
        return squish(*command.split(), cwd=folder, stdout=write)
    finally:
        os.close(write)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("convert --nf4 model.safetensors new", 0),
        ("convert --nf4 --json model.safetensors new", 0),
        ("convert --nf4 --json --dry-run model.safetensors", 0),
        ("diff out out", 0),
        ("diff out other", 1),
        ("doctor", 0),
        ("inspect --json out", 0),
    ],
)
def test_a_reader_that_has_gone_changes_no_exit_code(folder: Path, command: str, status: int) -> None:
    done = without_a_reader(folder, command)
    assert (done.returncode, done.stderr) == (status, "")
    assert "new" not in command or len(load_npy_dir(folder / "new")) == 2


@pytest.mark.parametrize("command", ["--version", "doctor", "diff out out"])
def test_a_full_disk_is_one_sentence(folder: Path, command: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = squish(*command.split(), cwd=folder, stdout=full)
    finally:
        os.close(full)
    assert done.returncode == (2 if command.startswith("diff") else 1)
    assert done.stderr == "squish-nf4: [Errno 28] No space left on device\n"
