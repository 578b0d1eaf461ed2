"""What a conversion refuses before anything is written, and what one that fails leaves and says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.npy_writer import NpyWriter
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from tests.support.directories import gaussian, is_finished, raw_shard, save_shard


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    for number, name in enumerate("abc", 1):
        save_shard(directory / f"model-0000{number}-of-00003.safetensors", {name: gaussian(4, 64)})
    return directory


# What is refused before anything is written


def refused(src, out, error, text, **options):
    with pytest.raises(error, match=text):
        convert(src, out, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a.b", "a__b"), "tensors 'a.b' and 'a__b' would both be stored as 'a__b'"),
        (("ok", "../x"), r"tensor '../x': files of that name would leave the directory"),
        (("/etc/x",), "tensor '/etc/x': files of that name would leave"),
        (("a/b",), "tensor 'a/b': files of that name would leave"),
        (("a\\b",), r"tensor 'a\\\\b': files of that name would leave"),
        (("C:x",), "tensor 'C:x': files of that name would leave"),
        (("a\0b",), r"tensor 'a\\x00b': the name holds a NUL"),
        (("",), "an empty name cannot be stored"),
        (
            ("x" * 300,),
            r"tensor 'x+\.\.\.x+' \(300 characters\): a file name would take 315 bytes; file systems allow 255",
        ),
        (("é" * 121,), "a file name would take 257 bytes"),
    ],
)
def test_a_name_that_cannot_be_a_file_name_is_refused(tmp_path, names, text):
    refused(raw_shard(tmp_path / "x.safetensors", names=names), tmp_path / "out", ValueError, text)


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "..", ".", "-rf", "con", " ", "a\nb", "emoji 🙂", "%s{}"])
def test_an_unusual_name_is_stored_and_read(tmp_path, name):
    convert(raw_shard(tmp_path / "x.safetensors", names=(name,)), tmp_path / "out")
    assert list(load_npy_dir(tmp_path / "out")) == [name]


def test_an_output_that_is_not_empty_is_refused_and_left_as_it_is(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("theirs")
    with pytest.raises(FileExistsError, match="out is not empty; convert into a new or an empty directory"):
        convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".hidden"]


def test_an_output_that_is_a_file_or_a_broken_link_is_refused(source, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not a directory"):
            convert(source, tmp_path / name)


def test_an_empty_output_and_missing_parents_are_fine(source, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(str(source), str(tmp_path / "a" / "b" / "c"))
    assert is_finished(tmp_path / "empty")
    assert is_finished(tmp_path / "a" / "b" / "c")


def test_an_output_inside_the_source_is_refused(source, tmp_path):
    refused(source, source / "nf4", ValueError, "nf4 lies inside the source")
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    refused(source, tmp_path / "link" / "nf4", ValueError, "lies inside the source")
    with pytest.raises(ValueError, match="lies inside the source"):
        convert(source, source)
    convert(source / "model-00001-of-00003.safetensors", source / "nf4")  # of one file, nothing beside it is read


@pytest.mark.parametrize("options", [{"group_size": 0}, {"outlier_threshold": math.nan}, {"passthrough": [""]}])
def test_a_wrong_option_is_refused(source, tmp_path, options):
    refused(source, tmp_path / "out", ValueError, "must be|holds an empty name", **options)


def test_a_group_size_that_is_no_whole_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_file({"w": torch.randn(4, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match=r"group_size must be a whole number, got 2\.5"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", group_size=2.5)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# What stops a conversion that has begun


def test_a_non_finite_weight_is_refused_and_what_is_left_is_said(tmp_path):
    w = gaussian(4, 8)
    w[3, 5] = math.nan
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(4, 8), "b.weight": w})
    with pytest.raises(
        ValueError, match=r"tensor 'b.weight': row 3, column 5 is nan; .*out is left unfinished, with 1 of 2 tensors"
    ):
        convert(file, tmp_path / "out")
    assert not is_finished(tmp_path / "out")
    with pytest.raises(ValueError, match="not a finished squish directory"):
        load_npy_dir(tmp_path / "out")
    with pytest.raises(FileExistsError):
        convert(file, tmp_path / "out")


def test_a_full_disk_stays_an_os_error_and_says_what_is_left(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NpyWriter, "write", full)
    with pytest.raises(OSError, match=r"No space left on device. .*out is left unfinished") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.errno == 28
    assert not is_finished(tmp_path / "out")


def test_an_interrupt_stays_one_and_says_what_is_left(source, tmp_path):
    def interrupt(progress):
        if progress.bytes_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"interrupted. .*out is left unfinished, with [1-9]"):
        convert(source, tmp_path / "out", progress=interrupt)
    assert not is_finished(tmp_path / "out")


def test_a_failure_of_the_callers_own_passes_through(source, tmp_path):
    class CancelledError(Exception):
        pass

    def cancel(_):
        raise CancelledError

    with pytest.raises(CancelledError):
        convert(source, tmp_path / "out", progress=cancel)
    assert not is_finished(tmp_path / "out")
