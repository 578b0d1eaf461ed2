"""Shards that are removed when what was made of them is on the disk, and those that must not be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from squish_nf4.checkpoint import resources as disk
from squish_nf4.checkpoint.conversion import recovery, run
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.options import ConvertOptions
from squish_nf4.checkpoint.conversion.plan import make_plan
from squish_nf4.checkpoint.directory.format import JOURNAL
from squish_nf4.checkpoint.messages import Progress
from tests.support.directories import StoppedError, gaussian, is_finished, save_shard, save_two_shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_two_shards(tmp_path / "source")


def test_the_source_is_removed_shard_by_shard_and_the_rest_stays(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "kept")
    convert(source, tmp_path / "out", delete_source=True)
    assert [file.name for file in source.iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "squish_nf4.json").read_bytes() == (tmp_path / "kept" / "squish_nf4.json").read_bytes()


def test_a_single_file_is_removed_too(source: Path, tmp_path: Path) -> None:
    convert(source / "1.safetensors", tmp_path / "out", delete_source=True)
    assert not (source / "1.safetensors").exists()
    assert (source / "2.safetensors").exists()


def test_a_single_file_that_was_removed_already_is_recalled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source / "1.safetensors", tmp_path / "fresh")
    stopped_after_a_removal(source / "1.safetensors", tmp_path / "out", monkeypatch)
    report = convert(source / "1.safetensors", tmp_path / "out", resume=True, delete_source=True)
    assert report.resumed == 2
    assert (tmp_path / "out" / "squish_nf4.json").read_bytes() == (tmp_path / "fresh" / "squish_nf4.json").read_bytes()


def test_the_only_copy_of_a_removed_shard_is_not_overwritten(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, shard = tmp_path / "out", (source / "1.safetensors").read_bytes()
    stopped_after_a_removal(source, out, monkeypatch)
    refused_to_overwrite(source, out)
    shutil.copytree(out, tmp_path / "copy")
    (source / "config.json").write_text("changed")
    assert len(convert(source, out, resume=True, delete_source=True).tensors) == 4
    with pytest.raises(FileNotFoundError):
        load_file(source / "2.safetensors")
    save_shard(source / "3.safetensors", {"another": gaussian(2, 4)})
    refused_to_overwrite(source, tmp_path / "copy")
    (source / "1.safetensors").write_bytes(shard)
    assert len(convert(source, tmp_path / "copy", overwrite=True).tensors) == 3


def stopped_after_a_removal(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a conversion when the first shard is gone."""

    first = source if source.suffix else source / "1.safetensors"

    def stop(*_: object) -> None:
        if not first.exists():
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(run, "require_read_back", stop)
        patch.setattr("squish_nf4.checkpoint.conversion.run.MOST_TENSORS", 2)
        patch.setattr(run, "sync", stop)
        with pytest.raises(StoppedError):
            convert(source, out, delete_source=True)
    assert not first.exists()


def test_a_file_that_does_not_read_back_saves_its_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = run.require_read_back

    def damaged(folder: Path, records: list[dict[str, object]]) -> None:
        file = folder / "1__weight__nf4.npy"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        verify(folder, records)

    monkeypatch.setattr(run, "require_read_back", damaged)
    with pytest.raises(ValueError, match=r"1__weight__nf4.npy does not read back .*; the source is kept"):
        convert(source, tmp_path / "out", delete_source=True)
    assert len(load_file(source / "1.safetensors")) == 2
    assert not is_finished(tmp_path / "out")


def another_file(shard: Path) -> None:
    """Of the same size, time and header, in its place."""
    other = shard.with_name("other")
    shutil.copy2(shard, other)
    with other.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(other, ns=(0, shard.stat().st_mtime_ns))
    other.replace(shard)


def other_values(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))


def other_values_at_the_same_time(shard: Path) -> None:
    status = shard.stat()
    other_values(shard)
    os.utime(shard, ns=(0, status.st_mtime_ns))


def another_header(shard: Path) -> None:
    """And nothing else, not even the time."""
    status = shard.stat()
    with shard.open("r+b") as file:
        file.write(bytes([255] * 8))
    os.utime(shard, ns=(0, status.st_mtime_ns))


def a_link(shard: Path) -> None:
    shard.rename(shard.with_name("moved"))
    shard.symlink_to("moved")


@pytest.mark.parametrize("replace", [another_file, other_values, other_values_at_the_same_time, another_header, a_link])
@pytest.mark.parametrize("late", [False, True], ids=["while it is read back", "while the journal is written"])
def test_a_shard_that_took_the_place_of_the_one_that_was_read_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], None], late: bool
) -> None:
    shard, found = source / "1.safetensors", []
    where: tuple[Any, str] = (Journal, "append") if late else (run, "require_read_back")
    call = getattr(*where)

    def replace_before(*args: Any) -> None:
        if not found and (not late or "removed" in args[1][0]):
            replace(shard)
            found.append(shard.read_bytes())
        call(*args)

    monkeypatch.setattr(*where, replace_before)
    monkeypatch.setattr("squish_nf4.checkpoint.conversion.run.MOST_TENSORS", 2)
    said = (
        r"1.safetensors was replaced or changed after it was read, and is not removed.*; when .* overwrite starts anew$"
    )
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "out", delete_source=True)
    assert [shard.read_bytes()] == found
    assert not is_finished(tmp_path / "out")
    shard.unlink()
    save_shard(shard, {"another": gaussian(2, 4)})
    convert(source, tmp_path / "out", overwrite=True)  # as the error says


def test_no_removal_is_journaled_of_a_shard_that_was_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is killed before it takes that back, OUT would pass for the only copy."""
    call, append, journaled = run.require_read_back, Journal.append, []

    def replace_before(*args: Any) -> None:
        other_values(source / "1.safetensors")
        call(*args)

    def append_and_keep(journal: Journal, facts: Any) -> None:
        journaled.extend(facts)
        append(journal, facts)

    monkeypatch.setattr(run, "require_read_back", replace_before)
    monkeypatch.setattr(Journal, "append", append_and_keep)
    with pytest.raises(ValueError, match=r"1.safetensors was replaced or changed after it was read"):
        convert(source, tmp_path / "out", delete_source=True)
    assert journaled
    assert not any("removed" in fact for fact in journaled)


def test_the_only_copy_of_a_removed_shard_is_said_to_be_that_when_another_one_was_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = run.require_read_back

    def replace_the_second(*args: Any) -> None:
        if not (source / "1.safetensors").exists():
            other_values(source / "2.safetensors")
        call(*args)

    monkeypatch.setattr(run, "require_read_back", replace_the_second)
    monkeypatch.setattr(run, "MOST_TENSORS", 2)
    said = r"2.safetensors was replaced .* it is the only copy of what the source held in '1.safetensors': .* resume"
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "out", delete_source=True)
    refused_to_overwrite(source, tmp_path / "out")


def stopped_after_the_first_tensor(source: Path, out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "MOST_TENSORS", 1)
        with pytest.raises(StoppedError):
            convert(source, out, on_tensor=stop_at_once, **options)


def stop_at_once(_: object) -> None:
    raise StoppedError


@pytest.mark.parametrize("change", [another_file, other_values_at_the_same_time, "an older journal"])
def test_a_shard_that_is_not_the_one_the_conversion_began_with_is_not_removed_when_it_goes_on(
    source: Path, tmp_path: Path, change: Callable[[Path], None] | str
) -> None:
    out, shard = tmp_path / "out", source / "1.safetensors"
    stopped_after_the_first_tensor(source, out)
    if callable(change):
        change(shard)
    else:
        header, facts = (out / JOURNAL).read_bytes().split(b"\n", 1)
        older = {what: fact for what, fact in json.loads(header).items() if what != "identities"}
        (out / JOURNAL).write_bytes(json.dumps(older).encode() + b"\n" + facts)
    before = (out / JOURNAL).read_bytes()
    with pytest.raises(ValueError, match=r"not known that .*out was begun with these .*'1.safetensors'.* verify"):
        convert(source, out, resume=True, delete_source=True)
    assert (out / JOURNAL).read_bytes() == before
    convert(source, out, resume=True)
    assert len(list(source.glob("*.safetensors"))) == 2


def test_what_a_copy_was_read_for_is_not_removed_though_the_first_file_comes_back(source: Path, tmp_path: Path) -> None:
    out, shard = tmp_path / "out", source / "1.safetensors"
    stopped_after_the_first_tensor(source, out)
    shutil.copytree(source, tmp_path / "copy")  # with its times
    stopped_after_the_first_tensor(tmp_path / "copy", out, resume=True)
    with pytest.raises(ValueError, match=r"not known that .*out was begun with these very files"):
        convert(source, out, resume=True, delete_source=True)
    assert shard.exists()


def test_a_weight_that_is_refused_is_found_before_anything_is_removed(source: Path, tmp_path: Path) -> None:
    bad = gaussian(4, 64)
    bad[3, 3] = torch.nan
    save_shard(source / "3.safetensors", {"bad": bad})
    with pytest.raises(ValueError, match="tensor 'bad': row 3, column 3 is nan"):
        convert(source, tmp_path / "out", delete_source=True)
    assert len(list(source.glob("*.safetensors"))) == 3
    assert not (tmp_path / "out").exists()


def test_a_refused_weight_is_not_said_to_go_away_by_going_on(source: Path, tmp_path: Path) -> None:
    save_shard(source / "3.safetensors", {"bad": torch.full((4, 64), torch.nan)})
    with pytest.raises(ValueError, match=r"is left unfinished, .* overwrite starts anew") as refused:
        convert(source, tmp_path / "out")
    assert "resume" not in str(refused.value)


def test_a_link_is_not_removed(source: Path, tmp_path: Path) -> None:
    (source / "1.safetensors").rename(tmp_path / "blob")
    (source / "1.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match=r"1.safetensors is a symbolic link"):
        convert(source, tmp_path / "out", delete_source=True)
    assert (tmp_path / "blob").exists()
    assert not (tmp_path / "out").exists()


def test_a_file_of_two_names_is_not_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").hardlink_to(source / "1.safetensors")
    with pytest.raises(ValueError, match=r"1.safetensors has another name elsewhere \(a hard link\)"):
        convert(source, tmp_path / "out", delete_source=True)
    assert (source / "1.safetensors").exists()
    assert not (tmp_path / "out").exists()


def test_what_was_made_of_a_removed_shard_must_still_be_there(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(progress: Progress) -> None:
        if not (source / "1.safetensors").exists():
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("squish_nf4.checkpoint.conversion.run.MOST_TENSORS", 1)
        with pytest.raises(StoppedError):
            convert(source, out, delete_source=True, progress=stop)
    shutil.copytree(out, tmp_path / "copy")
    (out / "tensors" / "1__bias__pt.npy").unlink()
    with pytest.raises(ValueError, match=r"tensor '1.bias': what was made of it is gone, and so is its shard"):
        convert(source, out, resume=True, delete_source=True)
    convert(source, tmp_path / "copy", resume=True, delete_source=True)
    assert is_finished(tmp_path / "copy")


def refused_to_overwrite(source: Path, out: Path) -> None:
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"is the only copy of what its source held in 1.safetensors"):
        convert(source, out, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


# Room on the disk


def with_free(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    """A disk that has so many bytes free, one after the other, and then the last of them."""
    left = list(free)
    usage = type(disk.shutil.disk_usage("/"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0, 0, int(left.pop(0) if left[1:] else left[0])))


def test_room_on_resume_is_for_the_shards_that_are_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_shard(source / "3.safetensors", {"3.weight": gaussian(64, 256, seed=3)})
    stopped_after_a_removal(source, tmp_path / "out", monkeypatch)
    needed = make_plan(source / "3.safetensors", ConvertOptions()).nbytes + len("{}")
    needed -= recovery.bytes_freed(tmp_path / "out", overwrite=False)
    assert needed > 4000
    with_free(monkeypatch, needed - 1)
    with pytest.raises(OSError, match="the conversion still takes"):
        convert(source, tmp_path / "out", min_free_gb=0, resume=True, delete_source=True)
    with_free(monkeypatch, needed)
    convert(source, tmp_path / "out", min_free_gb=0, resume=True, delete_source=True)


@pytest.mark.parametrize(
    ("steps", "most"),
    [([], 0), ([(5, 0), (5, 0)], 10), ([(5, 9), (5, 9)], 5), ([(1, 0), (9, 9)], 10)],
)
def test_removing_shards_as_they_are_done_takes_less(steps: list[tuple[int, int]], most: int) -> None:
    assert disk.peak(steps) == most
