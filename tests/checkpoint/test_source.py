"""Checkpoints as they are found: whole, in shards, with and without an index, damaged, and named by an enemy."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.npy_header import npy_header
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from squish_nf4.checkpoint.source import shard_file, tied
from squish_nf4.checkpoint.source.shards import DTYPES, Entry, open_source, read_values
from tests.support.directories import gaussian, raw_shard, save_index, save_shard


def names(source):
    return [entry.name for entry in source.entries]


def two_shards(directory):
    save_shard(directory / "model-00001-of-00002.safetensors", {"a": gaussian(2, 4), "b": gaussian(3)})
    save_shard(directory / "model-00002-of-00002.safetensors", {"c": gaussian(4, 2)})
    return {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


def test_one_file_is_a_source(tmp_path):
    source = open_source(save_shard(tmp_path / "x.safetensors", {"b": gaussian(2, 4), "a": torch.tensor(3)}))
    assert names(source) == ["a", "b"]
    assert [(e.dtype, e.shape, e.nbytes) for e in source.entries] == [(torch.int64, (), 8), (torch.float32, (2, 4), 32)]
    assert source.nbytes == 40
    assert source.small_files == []


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_a_source_with_or_without_an_index(tmp_path, indexed):
    weight_map = two_shards(tmp_path)
    if indexed:
        save_index(tmp_path, weight_map)
    source = open_source(tmp_path)
    assert names(source) == ["a", "b", "c"]
    assert source.notes == []
    assert {entry.name: tensor.shape for entry, tensor in source.tensors()} == {"a": (2, 4), "b": (3,), "c": (4, 2)}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_shard_that_is_no_file_is_refused_by_name(tmp_path, make):
    two_shards(tmp_path)
    make(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors is no regular file"):
        open_source(tmp_path)


def test_an_index_of_another_name_is_found(tmp_path):
    save_index(tmp_path, two_shards(tmp_path), "diffusion_pytorch_model.safetensors.index.json")
    assert names(open_source(tmp_path)) == ["a", "b", "c"]


def test_two_models_in_one_directory_are_refused(tmp_path):
    weight_map = two_shards(tmp_path)
    save_index(tmp_path, weight_map, "a.safetensors.index.json")
    save_index(tmp_path, weight_map, "b.safetensors.index.json")
    with pytest.raises(ValueError, match=r"several models \(a.safetensors.index.json, b.safetensors.index.json\)"):
        open_source(tmp_path)


def test_a_shard_that_the_index_names_but_is_missing_is_refused(tmp_path):
    weight_map = two_shards(tmp_path)
    save_index(tmp_path, weight_map | {"d": "model-00003-of-00002.safetensors"})
    with pytest.raises(
        FileNotFoundError, match=r"names model-00003-of-00002.safetensors, which is not in .* \(1 missing\)"
    ):
        open_source(tmp_path)


def test_a_tensor_that_the_index_promises_but_no_shard_holds_is_refused(tmp_path):
    weight_map = two_shards(tmp_path)
    save_index(tmp_path, weight_map | {"lost": "model-00002-of-00002.safetensors"})
    with pytest.raises(ValueError, match=r"says that model-00002-of-00002.safetensors holds 'lost', but it does not"):
        open_source(tmp_path)


def test_a_tensor_that_the_index_forgot_is_converted_and_noted(tmp_path):
    weight_map = two_shards(tmp_path)
    del weight_map["b"]
    save_index(tmp_path, weight_map)
    source = open_source(tmp_path)
    assert names(source) == ["a", "b", "c"]
    assert source.notes == ["in the shards but not in model.safetensors.index.json, converted all the same: 'b'"]


def test_a_file_that_the_index_does_not_name_is_left_and_noted(tmp_path):
    save_index(tmp_path, two_shards(tmp_path))
    save_shard(tmp_path / "consolidated.safetensors", {"a": gaussian(2, 4)})
    source = open_source(tmp_path)
    assert names(source) == ["a", "b", "c"]
    assert source.notes == ["not copied: consolidated.safetensors (weights outside the converted shards)"]


def test_a_name_that_two_shards_hold_is_refused(tmp_path):
    save_shard(tmp_path / "1.safetensors", {"a": gaussian(2, 4)})
    save_shard(tmp_path / "2.safetensors", {"a": gaussian(2, 4)})
    with pytest.raises(ValueError, match=r"tensor 'a' is in both 1.safetensors and 2.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_a_link_to_nothing_is_not_called_missing(tmp_path, indexed):
    weight_map = two_shards(tmp_path)
    if indexed:
        save_index(tmp_path, weight_map)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("blob")  # of a cache whose blobs were removed
    with pytest.raises(FileNotFoundError, match=r"00002.safetensors is a link to nothing \(blob is not there\)"):
        open_source(tmp_path)


def test_a_shard_that_the_system_does_not_open_is_not_called_missing(tmp_path):
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # a failure to open that meets root too
    try:
        with pytest.raises(OSError, match=r"x.safetensors cannot be read: Too many open files") as refused:
            open_source(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(refused.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors.index.json"])
def test_what_must_not_be_read_is_said_to_be_so(tmp_path, monkeypatch, name):
    save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    save_index(tmp_path, {"a": "x.safetensors"})
    opened = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(PermissionError, match=f"{name} cannot be read: Permission denied"):
        open_source(tmp_path)


def test_a_link_that_leads_to_itself_is_said_to_do_so(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("x.safetensors")
    with pytest.raises(OSError, match=r"x.safetensors cannot be read: Too many levels of symbolic links"):
        open_source(tmp_path)


NESTED = '{"weight_map": ' + "[" * 10**5 + "]" * 10**5 + "}"
SAFELY_NESTED = '{"weight_map": ' + "[" * 500 + "]" * 500 + "}"  # Python parses it, and may fail to print it


@pytest.mark.parametrize("text", [NESTED, SAFELY_NESTED], ids=["unparsed", "parsed"])
def test_an_index_that_is_nested_deeply_is_refused_by_name(tmp_path, text):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"index.json is not an index of safetensors shards: it is nested more than 16 levels deep"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}', "\xff" * 999],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, text):
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is not an index") as refused:
        open_source(tmp_path)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_an_index_that_is_no_file_is_refused(tmp_path, make):
    """A pipe would be waited for."""
    two_shards(tmp_path)
    make(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"index.json is not an index of .*: it is no regular file"):
        open_source(tmp_path)


def test_an_index_may_be_a_link(tmp_path):
    """As in the cache of Hugging Face."""
    save_index(tmp_path, two_shards(tmp_path / "model"), "blob")
    (tmp_path / "model" / "model.safetensors.index.json").symlink_to(tmp_path / "blob")
    assert names(open_source(tmp_path / "model")) == ["a", "b", "c"]


def test_an_index_that_says_a_thing_twice_or_is_too_long_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.dumps(two_shards(tmp_path))
    index.write_text(f'{{"weight_map": {{}}, "weight_map": {weight_map}}}')
    with pytest.raises(ValueError, match=r"is not an index of safetensors shards: 'weight_map' is there twice"):
        open_source(tmp_path)
    with index.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"is not an index of .*: it has 1099511627776 bytes; at most 536870912 are"):
        open_source(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "", "..", "x.bin"])
def test_an_index_that_points_out_of_its_directory_is_refused(tmp_path, shard):
    save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    save_index(tmp_path, {"a": shard})
    with pytest.raises(ValueError, match=r"which is no .safetensors file of its directory"):
        open_source(tmp_path)


DAMAGED = {
    "empty": b"",
    "short": b"abc",
    "not json": b"\x0a" + bytes(7) + b"{not json ",
    "a header of exabytes": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, kind):
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged: "):
        open_source(tmp_path)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(20, 4)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged: "):
        open_source(file)


def test_a_git_lfs_pointer_says_how_to_fetch_the_weights(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"x.safetensors is a Git LFS pointer; fetch the weights with: git lfs pull"):
        open_source(tmp_path)


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"neither a directory nor a .safetensors file"):
        open_source(tmp_path / "x.bin")
    with pytest.raises(
        ValueError, match=r"holds no .safetensors file \(it holds x.bin; save it as safetensors first\)"
    ):
        open_source(tmp_path)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no .safetensors file$"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="holds no tensors"):
        open_source(save_shard(tmp_path / "x.safetensors", {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_listed_dtype_is_what_torch_reads(tmp_path, dtype):
    source = open_source(raw_shard(tmp_path / "x.safetensors", dtype=dtype, itemsize=DTYPES[dtype].itemsize))
    [(entry, tensor)] = source.tensors()
    assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stretches_of_every_dtype_are_what_torch_reads(tmp_path, dtype):
    itemsize = DTYPES[dtype].itemsize
    file = raw_shard(tmp_path / "x.safetensors", names=("a", "b"), dtype=dtype, itemsize=itemsize)
    raw = bytearray(file.read_bytes())
    raw[-16 * itemsize :] = bytes(range(16 * itemsize)) if dtype != "BOOL" else bytes([0, 1] * 8)
    file.write_bytes(raw)
    for entry, tensor in open_source(file).tensors():
        flat = tensor.reshape(-1).view(torch.uint8)
        for first, count in ((0, 8), (3, 4), (7, 1), (2, 0)):
            read = read_values(entry, first, count)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), flat[first * itemsize : (first + count) * itemsize])


def test_a_shard_that_another_file_replaces_is_refused(tmp_path):
    """Of the same size and time."""
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    [entry] = open_source(file).entries
    other = save_shard(tmp_path / "other", {"a": gaussian(2, 4, seed=8)})
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)
    with pytest.raises(ValueError, match=r"x.safetensors was changed while it was read"):
        read_values(entry, 0, 8)


def test_a_shard_that_is_replaced_while_its_header_is_read_is_refused(tmp_path, monkeypatch):
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    other = save_shard(tmp_path / "other", {"b": gaussian(4, 2)})

    def replaced_first(*args, **kwargs):
        other.replace(file)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(shard_file, "safe_open", replaced_first)
    with pytest.raises(ValueError, match=r"x.safetensors was changed while it was read"):
        open_source(file)


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    [entry] = open_source(file).entries
    for change in (lambda: os.truncate(file, file.stat().st_size - 4), lambda: os.utime(file, (0, 0))):
        change()
        with pytest.raises(ValueError, match=r"x.safetensors was changed while it was read"):
            read_values(entry, 0, 8)


def test_a_shard_that_is_written_to_in_the_middle_of_a_read_is_refused(tmp_path, monkeypatch):
    """After whatever looks at it before the read, and with its time set back."""
    file = save_shard(tmp_path / "x.safetensors", {"a": gaussian(2, 4)})
    [entry] = open_source(file).entries
    status = file.stat()

    class WrittenTo(io.FileIO):
        def readinto(self, buffer):
            with open(file, "r+b") as writer:
                writer.seek(entry.start)
                writer.write(b"?")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            return super().readinto(buffer)

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: WrittenTo(path))
    with pytest.raises(ValueError, match=r"x.safetensors was changed while it was read"):
        read_values(entry, 0, 8)


@pytest.mark.parametrize(("dtype", "itemsize"), [("F4", 0.5), ("F6_E2M3", 0.75)])
def test_a_dtype_without_a_numpy_form_is_refused_before_work_starts(tmp_path, dtype, itemsize):
    file = raw_shard(tmp_path / "x.safetensors", dtype=dtype, itemsize=itemsize)
    with pytest.raises(ValueError, match=f"tensor 'a' in x.safetensors is {dtype}, which has no .npy form"):
        open_source(file)


def test_small_files_are_found_and_the_rest_is_noted_or_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr("squish_nf4.checkpoint.source.small_files.SMALL_FILE", 100)
    save_shard(tmp_path / "model.safetensors", {"a": gaussian(2, 4)})
    save_shard(tmp_path / "2_Dense" / "model.safetensors", {"a": gaussian(2, 4)})
    for place in (
        "config.json",
        "1_Pooling/config.json",
        "README.md",
        ".gitattributes",
        ".cache/token",
        "._model.safetensors",
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("x")
    (tmp_path / "film.mp4").write_bytes(bytes(101))
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "blob").write_text("x")
    (tmp_path / "link.json").symlink_to(tmp_path / "blob")  # as in a Hugging Face cache
    (tmp_path / "broken.json").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert [str(place) for _, place in source.small_files] == [
        "README.md",
        "blob",
        "config.json",
        "link.json",
        "1_Pooling/config.json",
    ]
    assert source.notes == [
        "not copied: broken.json (not a file, or a link to a folder)",
        "not copied: film.mp4 (0 MiB is not a small file)",
        "not copied: pipe (not a file, or a link to a folder)",
        "not copied: pytorch_model.bin (weights outside the converted shards)",
        "not copied: loop (not a file, or a link to a folder)",
        "not copied: 2_Dense/model.safetensors (weights outside the converted shards)",
    ]


@pytest.mark.parametrize("shape", [[1] * 63 + [4, 8], [1] * 66], ids=["in NF4", "kept"])
def test_more_dimensions_than_a_reader_takes_are_refused_before_anything_is_written(
    tmp_path: Path, shape: list[int]
) -> None:
    nbytes = 4 * math.prod(shape)
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    with pytest.raises(ValueError, match=rf"tensor 'a' in x.safetensors has {len(shape)} dimensions; .* at most 64"):
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"an array of {len(shape)} dimensions cannot be stored; at most 64 can"):
        npy_header(np.dtype(np.float32), shape)


def test_sixty_four_dimensions_are_written_and_read(tmp_path: Path) -> None:
    w = torch.arange(32.0).reshape(*[1] * 62, 4, 8)
    save_shard(tmp_path / "x.safetensors", {"a": w, "ids": w.long()})
    convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert load_npy_dir(tmp_path / "out")["a"].shape == w.shape
    assert torch.equal(load_npy_dir(tmp_path / "out")["ids"], w.long())


def test_the_index_is_not_a_small_file(tmp_path):
    save_index(tmp_path, two_shards(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert [str(place) for _, place in open_source(tmp_path).small_files] == ["config.json"]


def test_no_tensor_is_read_twice_to_find_those_that_are_tied(tmp_path, monkeypatch):
    alike = {f"constant{i}": torch.full((64, 64), 0.5) for i in range(30)}
    for i in range(30):
        alike[f"{i}"] = torch.zeros(64, 64)  # equal in the middle, and pairwise equal in all
        alike[f"{i}"][0, 0] = i // 2 + 1
    entries = open_source(save_shard(tmp_path / "x.safetensors", alike)).entries
    looks = []

    def count(entry: Entry, first: int, number: int) -> torch.Tensor:
        looks.append(number)
        return read_values(entry, first, number)

    monkeypatch.setattr(tied, "read_values", count)
    assert len(tied.find_tied(entries)) == 15
    assert sum(looks) <= 60 * (tied.SAMPLE + 1 + 64 * 64)
