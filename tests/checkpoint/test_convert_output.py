"""Where a conversion may write, what it replaces and removes, and whether the disk has room."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from squish_nf4.checkpoint import resources as disk
from squish_nf4.checkpoint.conversion import recovery
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.options import ConvertOptions
from squish_nf4.checkpoint.conversion.plan import make_plan
from squish_nf4.checkpoint.directory.npy_writer import NpyWriter
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from squish_nf4.checkpoint.messages import Progress
from tests.support.directories import (
    StoppedError,
    gaussian,
    is_finished,
    make_a_socket,
    save_shard,
    save_two_shards,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_two_shards(tmp_path / "source")


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# A finished directory


def test_a_finished_directory_is_refused_and_left_as_it_is(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = files(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="out is a finished squish directory; overwrite replaces it"):
            convert(source, tmp_path / "out", group_size=64, resume=resume)
    assert files(tmp_path / "out") == before


def test_one_that_was_finished_while_this_one_looked_at_its_source_is_refused_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin = recovery.begin

    def another(path: Path, header: dict[str, Any], *, overwrite: bool) -> Journal:
        monkeypatch.undo()
        convert(source / "1.safetensors", out)
        return begin(path, header, overwrite=overwrite)

    monkeypatch.setattr(recovery, "begin", another)
    with pytest.raises(FileExistsError, match="out is a finished squish directory"):
        convert(source, out)
    assert len(load_npy_dir(out)) == 2
    assert not list(out.glob("squish_nf4.journal*"))


def test_overwrite_replaces_all_that_it_wrote_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_shard(tmp_path / "old.safetensors", {"old": gaussian(4, 64), "1.weight": gaussian(2, 64)})
    convert(tmp_path / "old.safetensors", out, ultra=True)
    theirs = {"notes.txt": b"a", "tensors/notes.txt": b"b", "tensors/.squish_nf4-mine.part": b"c", "sub/x": b"d"}
    for name, text in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(text)
    convert(source, out, overwrite=True)
    convert(source, tmp_path / "fresh")
    found, expected = files(out), files(tmp_path / "fresh") | theirs
    found.pop("stats.json")
    expected.pop("stats.json")
    assert found == expected
    assert len(load_npy_dir(out)) == 4


def test_a_small_file_that_is_called_like_a_draft_is_not_lost(source: Path, tmp_path: Path) -> None:
    for name in ("manifest.json.part", "squish_nf4.json.part", "squish_nf4.journal.part"):
        (source / name).write_text("theirs")
    report = convert(source, tmp_path / "out")
    assert report.copied == ("config.json", "manifest.json.part", "squish_nf4.json.part")
    for name in report.copied[1:]:
        assert (tmp_path / "out" / name).read_text() == "theirs"
    assert (
        "not copied: squish_nf4.journal.part (a squish directory has its own squish_nf4.journal.part)" in report.notes
    )


def test_overwrite_makes_the_directory_unfinished_before_it_deletes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)

    def stop(_: Progress) -> None:
        assert not is_finished(out)
        assert not (out / "manifest.json").exists()
        raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, out, overwrite=True, progress=stop)
    with pytest.raises(ValueError, match="not a finished"):
        load_npy_dir(out)


def stopped_at_the_second_shard(source: Path, out: Path, **options: Any) -> None:
    def stop(progress: Progress) -> None:
        if progress.tensor == "2.weight":
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, out, progress=stop, **options)


def test_overwrite_of_an_unfinished_conversion_starts_anew(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped_at_the_second_shard(source, out, group_size=64)
    assert convert(source, out, overwrite=True).resumed == 0
    convert(source, tmp_path / "fresh")
    assert set(files(out)) == set(files(tmp_path / "fresh"))
    assert (out / "squish_nf4.json").read_bytes() == (tmp_path / "fresh" / "squish_nf4.json").read_bytes()


def test_overwrite_of_nothing_converts(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", overwrite=True)
    assert is_finished(tmp_path / "out")


def test_a_small_file_that_was_edited_stays_and_is_noted(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"edited": true}')
    report = convert(source, tmp_path / "out", overwrite=True)
    assert report.copied == ()
    assert "not copied: config.json (the output has a file of its own there)" in report.notes
    assert (tmp_path / "out" / "config.json").read_text() == '{"edited": true}'


def refused_to_overwrite(source: Path, out: Path, error: type[Exception], text: str) -> None:
    before = files(out)
    with pytest.raises(error, match=text):
        convert(source, out, overwrite=True)
    assert files(out) == before


def test_overwrite_refuses_what_another_program_wrote(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("theirs")
    refused_to_overwrite(source, out, FileExistsError, "out is not empty")
    (out / "tensors").mkdir()
    (out / "tensors" / ".manifest_ready").touch()
    refused_to_overwrite(source, out, ValueError, "its squish_nf4.json does not say which files")


def test_overwrite_reads_squish_nf4_json_as_carefully_as_a_reader_does(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    sidecar = out / "squish_nf4.json"
    whole = sidecar.read_text()
    sidecar.unlink()
    os.mkfifo(sidecar)  # which would be waited for
    refused_to_overwrite(source, out, ValueError, r"squish_nf4.json is not a regular file")
    sidecar.unlink()
    sidecar.write_text(whole.replace("{", '{"copied": {}, ', 1))
    refused_to_overwrite(source, out, ValueError, r"'copied' is there twice")
    (tmp_path / "elsewhere").write_text(whole)
    sidecar.unlink()
    sidecar.symlink_to(tmp_path / "elsewhere")
    refused_to_overwrite(source, out, ValueError, r"squish_nf4.json is a link out of the directory")


def kinds(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): stat.S_IFMT(path.lstat().st_mode) for path in out.rglob("*")}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_a_socket])
@pytest.mark.parametrize("begun", [False, True], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", "stats.json", "squish_nf4.json", "tensors/.manifest_ready", "tensors/1__bias__pt.npy"),
        *("squish_nf4.journal", "squish_nf4.journal.part", "tensors/.squish_nf4-00000000-1.part"),
    ],
)
def test_what_is_no_regular_file_stays_and_what_is_finished_too(
    source: Path, tmp_path: Path, make: Callable[[Path], None], begun: bool, name: str
) -> None:
    """Either the conversion is refused with nothing changed, or it does not need that name."""
    out = tmp_path / "out"
    if begun:
        stopped_at_the_second_shard(source, out)
    else:
        convert(source, out)
    (out / name).unlink(missing_ok=True)
    make(out / name)
    before = kinds(out)
    try:
        convert(source, out, overwrite=True)
    except (OSError, ValueError):
        assert kinds(out) == before
    else:
        assert name.endswith("1.part")
        assert kinds(out)[name] == before[name]


def test_overwrite_refuses_to_delete_a_tensors_file_that_was_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    file = out / "tensors" / "1__bias__pt.npy"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    for changed in (b"theirs", bytes(flipped)):
        file.write_bytes(changed)
        refused_to_overwrite(source, out, ValueError, r"1__bias__pt.npy was changed since it was written")


@pytest.mark.parametrize("name", ["../../victim", "/etc/hostname", "x/../../../victim"])
def test_overwrite_deletes_nothing_outside_whatever_the_sidecar_says(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    convert(source, out)
    (tmp_path / "victim").write_text("theirs")
    sidecar = json.loads((out / "squish_nf4.json").read_text())
    sidecar["tensors"]["1.bias"]["files"] = {name: {"bytes": 6, "sha256": ""}}
    (out / "squish_nf4.json").write_text(json.dumps(sidecar))
    refused_to_overwrite(source, out, ValueError, "lies outside it")
    assert (tmp_path / "victim").read_text() == "theirs"


def replacing(lines: list[dict[str, Any]], name: str) -> None:
    lines[0]["replaces"] = [name]


def of_a_tensor(lines: list[dict[str, Any]], name: str) -> None:
    [fact] = [fact for fact in lines if fact.get("tensor") == "1.bias"]
    fact["parts"] = {name: name}
    fact["record"]["files"] = {name: {"bytes": 6, "sha256": ""}}


def copied(lines: list[dict[str, Any]], name: str) -> None:
    lines.append({"copied": name, "parts": {name: name}, "record": {"bytes": 6, "sha256": ""}})


@pytest.mark.parametrize("name", ["../../victim", "../victim", "/etc/hostname"])
@pytest.mark.parametrize("hostile", [replacing, of_a_tensor, copied])
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_nothing_outside_is_touched_whatever_the_journal_says(
    source: Path,
    tmp_path: Path,
    hostile: Callable[[list[dict[str, Any]], str], None],
    name: str,
    options: dict[str, bool],
) -> None:
    out = tmp_path / "folder" / "out"

    def stop(progress: Progress) -> None:
        if progress.tensor == "2.weight":
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, out, progress=stop)
    for victim in (tmp_path / "victim", tmp_path / "folder" / "victim"):
        victim.write_text("theirs")
    lines = [json.loads(line) for line in (out / "squish_nf4.journal").read_bytes().splitlines()]
    hostile(lines, name)
    (out / "squish_nf4.journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = files(tmp_path / "folder")
    with pytest.raises(ValueError, match="lies outside it"):
        convert(source, out, **options)
    if "overwrite" in options:
        assert files(tmp_path / "folder") == before
    assert (tmp_path / "victim").read_text() == (tmp_path / "folder" / "victim").read_text() == "theirs"


def test_overwrite_does_not_follow_a_link_out_of_the_directory(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    (out / "tensors").rename(tmp_path / "elsewhere")
    (out / "tensors").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = files(tmp_path / "elsewhere")
    refused_to_overwrite(source, out, ValueError, "lies outside it")
    assert files(tmp_path / "elsewhere") == before


# Room on the disk


def with_free(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    """A disk that has so many bytes free, one after the other, and then the last of them."""
    left = list(free)
    usage = type(disk.shutil.disk_usage("/"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0, 0, int(left.pop(0) if left[1:] else left[0])))


def test_a_full_disk_is_foreseen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = make_plan(source, ConvertOptions()).bytes_taken(removing=False)
    with_free(monkeypatch, 10**9 + needed - 1)
    with pytest.raises(OSError, match=r"out is on a disk with 1.00 GB free; .* 1 GB are to stay free") as refused:
        convert(source, tmp_path / "out")
    assert refused.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    with_free(monkeypatch, 10**9 + needed)
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("min_free_gb", [-1, float("nan")])
def test_room_that_is_no_amount_is_refused(source: Path, tmp_path: Path, min_free_gb: float) -> None:
    with pytest.raises(ValueError, match=r"min_free_gb must be 0 or more, got (-1|nan)"):
        convert(source, tmp_path / "out", min_free_gb=min_free_gb)
    assert not (tmp_path / "out").exists()


def test_what_is_there_counts_when_it_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "out")
    with_free(monkeypatch, 2000)  # enough for config.json and the tables alone
    convert(source, tmp_path / "out", overwrite=True, min_free_gb=0)


def test_the_files_of_others_do_not_count(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    save_shard(tmp_path / "old.safetensors", {"old": gaussian(2, 4)})
    convert(tmp_path / "old.safetensors", out)
    (out / "tensors" / "theirs").write_bytes(bytes(10**6))
    (out / "tensors" / "dangling").symlink_to("nowhere")
    with_free(monkeypatch, 2000)
    with pytest.raises(OSError, match="the conversion still takes"):
        convert(source, out, overwrite=True, min_free_gb=0)
    assert is_finished(out)


def test_the_forecast_is_what_is_written(source: Path, tmp_path: Path) -> None:
    """Of float32 tensors that are kept in float32, and of NF4."""
    report = convert(source, tmp_path / "out")
    assert make_plan(source, ConvertOptions()).nbytes == report.bytes_out


def test_it_stops_before_others_have_filled_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squish_nf4.checkpoint.conversion.run.MOST_TENSORS", 1)
    with_free(monkeypatch, 10**12, 10**12, 10**9 - 1)
    with pytest.raises(OSError, match=r"0 GB.*out is left unfinished, with [23] of 4 tensors") as stopped:
        convert(source, tmp_path / "out")
    assert stopped.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert convert(source, tmp_path / "out", resume=True).resumed >= 2


def test_a_disk_that_fills_anyway_leaves_what_was_finished_and_no_part(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = NpyWriter.write

    def full(self: NpyWriter, values: object) -> None:
        if self.name == "2__weight__nf4.npy":
            self.file.write(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, values)  # type: ignore[arg-type]

    monkeypatch.setattr(NpyWriter, "write", full)
    with pytest.raises(OSError, match=r"No space left on device. .*out is left unfinished, with \d of 4") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.undo()
    convert(source, tmp_path / "out", resume=True)
    convert(source, tmp_path / "fresh")
    assert (tmp_path / "out" / "squish_nf4.json").read_bytes() == (tmp_path / "fresh" / "squish_nf4.json").read_bytes()


def test_a_disk_that_fails_to_sync_ends_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: NpyWriter) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(NpyWriter, "sync", fail)
    with pytest.raises(OSError, match=r"Input/output error. .*with 0 of 4 tensors"):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    convert(source, tmp_path / "out", resume=True)
