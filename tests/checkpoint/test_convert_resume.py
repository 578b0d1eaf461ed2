"""Conversions that end before their time, and go on: killed, out of disk, with another source or option."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from squish_nf4.checkpoint.conversion.convert import UnfinishedError, convert
from squish_nf4.checkpoint.messages import Progress
from tests.support.directories import StoppedError, contents, gaussian, is_finished, save_index, save_shard
from tests.support.processes import start

JOURNAL = "squish_nf4.journal"
KILLS = 20
ENDED = 70  # exit status of a child that ended as it was told

outlier = gaussian(300, 512)
outlier[7, 7] = 1e4
W = gaussian(200, 1024, seed=1)
TENSORS = {
    "1": {"embed.weight": W, "norm.weight": gaussian(512, seed=2), "steps": torch.arange(5)},
    "2": {
        "spiky.weight": outlier,
        "odd.weight": gaussian(10, 7),
        **{f"layer.{i}.weight": gaussian(32, 256, seed=i) for i in range(70)},
    },
    "3": {"head.weight": W, "half.weight": gaussian(500, 512, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    for shard, tensors in TENSORS.items():
        save_shard(directory / f"{shard}.safetensors", tensors)
    save_index(directory, {name: f"{shard}.safetensors" for shard, tensors in TENSORS.items() for name in tensors})
    (directory / "config.json").write_text("{}")
    (directory / "more").mkdir()
    (directory / "more" / "vocab.txt").write_text("a\nb\n" * 1000)
    return directory


# A process that has loaded the library, and that forks a child for every conversion. A child is killed before its line
# of Python of that number, in whichever thread: a moment that does not move where the machine is busy. Or it ends with
# no word before the file operation of that number. The answer is its exit status (negative if it was killed), and where
# it was not ended the lines and operations it needed.
SERVER = """
import json, os, signal, sys, threading
from squish_nf4.checkpoint.conversion.convert import convert
print("ready", flush=True)
for line in sys.stdin:
    source, out, last_line, last, options = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lines = operations = 0
        def enter(frame, event, arg):
            return count_lines if "squish_nf4" in frame.f_code.co_filename else None
        def count_lines(frame, event, arg):
            global lines
            if event == "line":
                if lines == last_line:
                    os.kill(os.getpid(), signal.SIGKILL)
                lines += 1
            return count_lines
        def count(event, args):
            global operations
            in_out = event in ("open", "os.rename", "os.mkdir", "os.truncate") and str(args[0]).startswith(out)
            if in_out or event == "os.remove":
                if operations == last:
                    os._exit(70)
                operations += 1
        sys.addaudithook(count)
        threading.settrace(enter)
        sys.settrace(enter)
        convert(source, out, min_free_gb=0, **options)
        sys.settrace(None)
        os.write(writer, json.dumps([lines, operations]).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    needed = json.loads(os.read(reader, 100) or b"[0, 0]")
    os.close(reader)
    print(json.dumps([os.waitstatus_to_exitcode(status), *needed]), flush=True)
"""


class Server:
    def __enter__(self) -> Server:
        command = [sys.executable, "-c", SERVER]
        self.process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def convert(
        self, source: Path, out: Path, *, last_line: int = -1, last: int = -1, **options: object
    ) -> tuple[int, int, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(source), str(out), last_line, last, options]) + "\n")
        self.process.stdin.flush()
        status, lines, operations = json.loads(self.process.stdout.readline())
        return status, lines, operations

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.sweeps
def test_killed_at_random_moments_it_goes_on_to_the_same_directory(
    server: Server, source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "expected", ultra=True)
    expected = contents(tmp_path / "expected")
    status, lines, _ = server.convert(source, tmp_path / "whole", ultra=True)
    assert status == 0
    assert lines > 1000
    assert contents(tmp_path / "whole") == expected
    moments = random.Random(6)
    kills, states = 0, set()
    while kills < KILLS:
        out = tmp_path / f"out{kills}"
        while server.convert(source, out, last_line=moments.randrange(lines), resume=True, ultra=True)[0] != 0:
            if is_finished(out) and not (out / JOURNAL).exists():
                break  # it was killed when all was done
            kills += 1
            states.add(len((out / JOURNAL).read_bytes().splitlines()) if (out / JOURNAL).exists() else 0)
        assert contents(out) == expected
    assert len(states) > 2, "all kills met the same state"


SMALL = {
    "a": gaussian(40, 64),
    "b": gaussian(40, 64),  # tied to a
    "c": torch.cat([gaussian(9, 64), torch.eye(1, 64) * 1e4]),
}


@pytest.mark.sweeps
def test_ended_before_any_file_operation_it_goes_on_to_the_same_directory(server: Server, tmp_path: Path) -> None:
    """Not random: every open, rename, removal and mkdir is once the first that does not happen any more.

    The conversion overwrites another one and removes its source, so that it has all the operations there are.
    """
    for shard, names in (("1", "a"), ("2", "bc")):
        save_shard(tmp_path / "model" / "source" / f"{shard}.safetensors", {name: SMALL[name] for name in names})
    (tmp_path / "model" / "source" / "config.json").write_text("{}")
    convert(tmp_path / "model" / "source", tmp_path / "model" / "out", group_size=8)
    (tmp_path / "model" / "out" / "theirs").write_text("stays")
    options = {"delete_source": True}

    def prepared(name: str) -> tuple[Path, Path]:
        shutil.copytree(tmp_path / "model", tmp_path / name)  # with its times
        return tmp_path / name / "source", tmp_path / name / "out"

    source, out = prepared("expected")
    status, _, operations = server.convert(source, out, overwrite=True, **options)
    assert status == 0
    assert operations > 30
    expected = contents(out)
    for last in range(operations):
        source, out = prepared(str(last))
        assert server.convert(source, out, last=last, overwrite=True, **options)[0] == ENDED
        begun = (out / JOURNAL).exists() or not is_finished(out)
        if begun or list(source.glob("*.safetensors")):
            again = {"resume": True} if begun else {"overwrite": True}
            assert server.convert(source, out, **again, **options)[0] == 0, last
        assert contents(out) == expected, last
        assert list(source.iterdir()) == [source / "config.json"], last


def test_a_file_gets_its_name_when_the_disk_has_it_and_the_journal_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename = os.fsync, Path.rename
    synced: list[int] = []
    renamed: list[str] = []

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def check_rename(self: Path, target: Path) -> Path:
        journal = (tmp_path / "out" / JOURNAL).stat().st_ino
        own = synced.index(self.stat().st_ino)
        assert journal in synced[own:], f"{target.name} before its line of the journal"
        assert target.name in (tmp_path / "out" / JOURNAL).read_text()
        renamed.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", check_rename)
    convert(source, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out" / "tensors").glob("*.npy")}
    assert len(written) > 100
    assert {name for name in renamed if name.endswith(".npy")} == written
    assert {"config.json", "vocab.txt"} < set(renamed)
    for folder in (tmp_path / "out", tmp_path / "out" / "tensors", tmp_path / "out" / "more"):
        assert folder.stat().st_ino in synced


# What a resume takes, and what it refuses


def stop_after(n: int) -> Callable[[Progress], None]:
    """Stops a conversion when it comes to its tensor number n."""
    seen: list[str] = []

    def progress(progress: Progress) -> None:
        if progress.tensor not in seen:
            seen.append(progress.tensor)
        if len(seen) > n:
            raise StoppedError

    return progress


def stopped(source: Path, out: Path, n: int = 4, **options: Any) -> None:
    with pytest.raises(StoppedError):
        convert(source, out, progress=stop_after(n), **options)


def test_what_was_finished_is_not_done_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out)
    before = {file.name: file.stat().st_mtime_ns for file in (out / "tensors").iterdir()}
    assert before
    seen: list[Progress] = []
    told: list[str] = []
    report = convert(source, out, resume=True, progress=seen.append, on_tensor=lambda tensor: told.append(tensor.name))
    assert {name: (out / "tensors" / name).stat().st_mtime_ns for name in before} == before
    assert report.resumed == 4
    assert len(told) == len(report.tensors) - 4
    assert seen[0].bytes_done == sum(tensor.bytes_in for tensor in report.tensors[:4])
    assert seen[-1].bytes_done == seen[-1].bytes_total == report.bytes_in
    fresh = convert(source, tmp_path / "fresh")
    assert report.tensors == fresh.tensors
    assert report.notes == fresh.notes


def test_resume_of_nothing_begins(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        assert convert(source, tmp_path / name, resume=True).resumed == 0


def test_an_unfinished_conversion_is_refused_without_resume(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out holds an unfinished conversion; resume goes on with it"):
        convert(source, tmp_path / "out")


def another_mtime(source: Path) -> None:
    os.utime(source / "2.safetensors", (0, 0))


def another_header(source: Path) -> None:
    """The same size and time, and other names."""
    file = source / "2.safetensors"
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"layer.11.weight", b"layer.xx.weight"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    (source / "model.safetensors.index.json").unlink()


def another_tensor(source: Path) -> None:
    save_shard(source / "2.safetensors", {**TENSORS["2"], "more": gaussian(2, 4)})


def another_shard(source: Path) -> None:
    save_shard(source / "4.safetensors", {"more": gaussian(2, 4)})
    (source / "model.safetensors.index.json").unlink()


def another_small_file(source: Path) -> None:
    (source / "config.json").write_text('{"changed": true}')


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (another_mtime, "another 2.safetensors"),
        (another_header, "another 2.safetensors"),
        (another_tensor, "another 2.safetensors"),
        (another_shard, "another 4.safetensors"),
        (another_small_file, "another config.json"),
    ],
)
def test_a_changed_source_is_refused(source: Path, tmp_path: Path, change: Callable[[Path], None], text: str) -> None:
    (source / "model.safetensors.index.json").unlink()
    stopped(source, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    save_index(source, {})
    change(source)
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"out was begun with {text}"):
        convert(source, tmp_path / "out", resume=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": 64}, "another group_size: it was None, and is 64"),
        ({"outlier_threshold": 21.0}, "another outlier_threshold: it was 20.0, and is 21.0"),
        ({"passthrough": ["x"]}, r"another passthrough: it was \[\], and is \['x'\]"),
        ({"include": ["x"]}, "another include"),
        ({"super_weight": True}, "another super_weight"),
        ({"ultra": True}, "another ultra"),
    ],
)
def test_a_changed_option_is_refused(source: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    stopped(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"out was begun with {text}"):
        convert(source, tmp_path / "out", resume=True, **options)
    convert(source, tmp_path / "out", resume=True, max_ram=2**28, min_free_gb=0)  # these change no byte


def test_another_writer_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(source, tmp_path / "out")
    monkeypatch.setattr("squish_nf4.checkpoint.conversion.journal.WRITER", "squish_nf4 99")
    with pytest.raises(ValueError, match=r"another writer: it was squish_nf4 .*, and is squish_nf4 99"):
        convert(source, tmp_path / "out", resume=True)


def test_a_finished_file_that_was_changed_is_refused_and_one_that_is_gone_is_written_again(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, tmp_path / "fresh")
    stopped(source, out)
    file = out / "tensors" / "embed__weight__nf4.npy"
    whole = file.read_bytes()
    for changed in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"embed__weight__nf4.npy was changed since it was written"):
            convert(source, out, resume=True)
    file.unlink()
    convert(source, out, resume=True)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_shard_of_before_1970_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    os.utime(source / "1.safetensors", (-5, -5))
    os.utime(source / "config.json", (-5, -5))
    stopped(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", resume=True).resumed == 4


def test_a_line_cut_short_never_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, tmp_path / "fresh")
    stopped(source, out)
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"tensor": "layer.1.we')
    convert(source, out, resume=True)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("text", [b"", b"hello\n", b"[]\n", b'{"journal": 1'])
def test_a_damaged_journal_is_refused(source: Path, tmp_path: Path, text: bytes) -> None:
    stopped(source, tmp_path / "out")
    (tmp_path / "out" / JOURNAL).write_bytes(text)
    with pytest.raises(ValueError, match=r"squish_nf4.journal is (damaged|not the journal of a conversion)"):
        convert(source, tmp_path / "out", resume=True)


@pytest.mark.parametrize("text", [b"", b"{}\n"])
def test_a_strange_journal_in_a_finished_directory_is_to_be_moved_away(
    source: Path, tmp_path: Path, text: bytes
) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / JOURNAL).write_bytes(text)
    for way in ("resume", "overwrite"):
        with pytest.raises(ValueError, match=r"; move it away: .*out holds a finished conversion$"):
            convert(source, tmp_path / "out", **{way: True})
    assert is_finished(tmp_path / "out")


def test_two_conversions_into_one_directory_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def another(_: Progress) -> None:
        with pytest.raises(BlockingIOError, match="out is being written by another conversion"):
            convert(source, out, resume=True)
        raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, out, progress=another)
    convert(source, out, resume=True)


def test_no_part_and_no_journal_is_left_in_a_finished_directory(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out)
    (out / "tensors" / ".squish_nf4-0123abcd-7.part").write_text("of a session that was killed")
    convert(source, out, resume=True)
    assert not (out / JOURNAL).exists()
    assert not list(out.rglob("*.part"))


def test_a_file_that_this_tool_did_not_write_is_neither_deleted_nor_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out)
    theirs = out / "tensors" / "half__weight__nf4.npy"
    theirs.write_text("theirs")
    (out / "notes.txt").write_text("theirs")
    with pytest.raises(UnfinishedError, match=r"half__weight__nf4.npy is there already, and this conversion did not"):
        convert(source, out, resume=True)
    assert theirs.read_text() == "theirs"
    theirs.unlink()
    convert(source, out, resume=True)
    assert (out / "notes.txt").read_text() == "theirs"
