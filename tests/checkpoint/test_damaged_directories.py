"""Squish directories that are unfit to read, each refused with the file and the cause, before anything is allocated."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from torch.profiler import ProfilerActivity, profile

from squish_nf4.checkpoint import resources
from squish_nf4.checkpoint.audit.verify import verify
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.reader import iter_npy_dir, load_npy_dir, open_directory
from squish_nf4.checkpoint.directory.stored_tensor import AT_ONCE
from tests.support.directories import (
    MANIFEST,
    allocating_at_most,
    compress,
    gaussian,
    header,
    npy,
    remove,
    replace,
    save_shard,
    sparse,
    write_foreign_dir,
    write_small_dir,
)
from tests.support.processes import run_python

TERABYTE = 2**40


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_small_dir(tmp_path / "dir")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory that we wrote: w in NF4, b kept."""
    save_shard(tmp_path / "model.safetensors", {"w": gaussian(4, 64), "b": gaussian(3)})
    convert(tmp_path / "model.safetensors", tmp_path / "own")
    return tmp_path / "own"


def assert_refused(path: Path, text: str) -> None:
    """By both readers, before the first tensor, and without memory."""
    with allocating_at_most(2**20):
        with pytest.raises(ValueError, match=text):
            load_npy_dir(path)
        with pytest.raises(ValueError, match=text):
            next(iter_npy_dir(path))


def test_an_unfinished_directory_is_refused(foreign: Path) -> None:
    (foreign / "tensors" / ".manifest_ready").unlink()
    assert_refused(foreign, r"is not a finished squish directory: it has no tensors/.manifest_ready")


def test_a_missing_directory_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        load_npy_dir(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is not a directory"):
        load_npy_dir(tmp_path / "file")


@pytest.mark.parametrize("suffix", ["__pt_df11.npy", "__pt_df11.npy.zst"])
def test_another_writers_pickle_is_refused_by_name_and_never_opened(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "loads", explode)
    monkeypatch.setattr(pickle, "load", explode)
    (foreign / "tensors" / f"a__bias{suffix}").write_bytes(b"\x80\x04N.")
    assert_refused(foreign, f"tensor 'a.bias': a__bias{suffix} is a pickle of another program, .* write .* __pt.npy")


def test_an_object_array_is_refused_with_advice(foreign: Path) -> None:
    np.save(foreign / "tensors" / "ids__pt.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert_refused(
        foreign, r"ids__pt.npy holds Python objects: that is a pickle, .* let its writer store plain numbers"
    )


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.zeros(2, dtype="V2"), np.zeros(2, dtype="M8[s]")], ids=["text", "void", "time"]
)
def test_an_array_without_numbers_is_refused(foreign: Path, array: np.ndarray) -> None:
    np.save(foreign / "tensors" / "ids__pt.npy", array)
    assert_refused(foreign, r"ids__pt.npy holds .*, which is no number type")


def test_a_float_that_torch_lacks_is_refused(foreign: Path) -> None:
    np.save(foreign / "tensors" / "ids__pt.npy", np.zeros(2, dtype=np.longdouble))
    assert_refused(foreign, r"tensor 'ids': torch has no float128")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "scales missing": (remove("a__weight__s_nf4"), r"found: __nf4.npy, __shape.npy"),
    "packed missing": (remove("a__weight__nf4"), r"found: __s_nf4.npy, __shape.npy"),
    "stored in two forms": (
        replace("a__weight__pt", np.ones(4)),
        "found: __nf4.npy, __pt.npy, __s_nf4.npy, __shape.npy",
    ),
    "stored twice": (
        lambda f: (f / "a__weight__nf4.npy.zst").touch(),
        "a__weight__nf4.npy is there twice, plain and as .zst",
    ),
    "packed of int8": (
        replace("a__weight__nf4", np.zeros((6, 16), np.int8)),
        "a__weight__nf4.npy must be uint8 and a__weight__s_nf4.npy float32, got int8 and float32",
    ),
    "scales of float64": (replace("a__weight__s_nf4", np.zeros((6, 4))), "got uint8 and float64"),
    "packed 1-D": (
        replace("a__weight__nf4", np.zeros(96, np.uint8)),
        r"a__weight__nf4.npy \(96,\) and a__weight__s_nf4.npy \(6, 4\) do not belong together",
    ),
    "rows differ": (replace("a__weight__s_nf4", np.zeros((5, 4), np.float32)), "do not belong together"),
    "no scale": (replace("a__weight__s_nf4", np.zeros((6, 0), np.float32)), "do not belong together"),
    "no columns": (replace("a__weight__nf4", np.zeros((6, 0), np.uint8)), "do not belong together"),
    "groups of no size": (replace("a__weight__s_nf4", np.zeros((6, 5), np.float32)), "do not belong together"),
    "too many scales": (replace("a__weight__s_nf4", np.zeros((6, 64), np.float32)), "do not belong together"),
    "another shape": (replace("a__weight__shape", np.array([2, 3, 31])), "is not the shape of 192 values"),
    "a negative shape": (replace("a__weight__shape", np.array([-6, -32])), "is not the shape of 192 values"),
    "a shape of floats": (replace("a__weight__shape", np.array([6.0, 32.0])), "is not the shape of 192 values"),
    "a shape in 2-D": (replace("a__weight__shape", np.array([[6, 32]])), "is not the shape of 192 values"),
    "a shape of 65": (
        replace("a__weight__shape", np.array([192] + [1] * 64)),
        "says 65 dimensions; at most 64 are read",
    ),
    "a shape beyond int64": (
        replace("a__weight__shape", np.array([2**63, 2], np.uint64)),
        "is not the shape of 192 values",
    ),
    "not an array": (lambda f: (f / "a__weight__nf4.npy").write_bytes(b"hello"), "a__weight__nf4.npy is no .npy file"),
    "an empty file": (lambda f: (f / "a__weight__nf4.npy").write_bytes(b""), "a__weight__nf4.npy is no .npy file"),
    "a folder": (
        lambda f: ((f / "a__weight__nf4.npy").unlink(), (f / "a__weight__nf4.npy").mkdir()),
        "a__weight__nf4.npy is not a regular file",
    ),
    "a pipe, which would wait": (
        lambda f: ((f / "a__weight__nf4.npy").unlink(), os.mkfifo(f / "a__weight__nf4.npy")),
        "a__weight__nf4.npy is not a regular file",
    ),
    "a link to nothing": (
        lambda f: ((f / "a__weight__nf4.npy").unlink(), (f / "a__weight__nf4.npy").symlink_to("gone")),
        "a__weight__nf4.npy is a link to nothing",
    ),
    "a byte less": (
        lambda f: os.truncate(f / "a__weight__nf4.npy", 223),
        r"a__weight__nf4.npy declares uint8 \(6, 16\), which makes a file of 224 bytes, and has 223",
    ),
    "a byte more": (
        lambda f: os.truncate(f / "a__weight__nf4.npy", 225),
        r"a__weight__nf4.npy declares uint8 \(6, 16\), which makes a file of 224 bytes, and has 225",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_the_tensor_and_the_cause(foreign: Path, kind: str) -> None:
    damage, text = DAMAGE[kind]
    damage(foreign / "tensors")
    assert_refused(foreign, f"tensor 'a.weight': .*{text}")


def damaged_at(place: int) -> Callable[[bytes], bytes]:
    return lambda raw: bytes([*raw[:place], raw[place] ^ 0x10, *raw[place:][1:]])


DAMAGED_ZST: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in its data": (lambda raw: raw[: len(raw) // 2], "is cut off: its last frame has no end|is no .npy file"),
    "cut in its checksum": (lambda raw: raw[:-3], "is cut off: its last frame has no end"),
    "cut to nothing": (lambda raw: b"", "is no .npy file"),
    "no frame": (lambda raw: b"hello", "is damaged: zstd"),
    "another checksum": (damaged_at(-2), "is damaged: zstd .*checksum"),
    "more behind it": (lambda raw: raw + b"more", "is damaged: zstd"),
    "two arrays": (lambda raw: raw + raw, r"declares uint8 \(6, 16\), 96 bytes, and holds more"),
    "fewer values": (
        lambda raw: recompressed(raw, lambda npy: npy[:-1]),
        r"declares uint8 \(6, 16\), 96 bytes, and holds 95",
    ),
    "more values": (
        lambda raw: recompressed(raw, lambda npy: npy + b"\0"),
        r"declares uint8 \(6, 16\), 96 bytes, and holds more",
    ),
}


def recompressed(raw: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return zstandard.ZstdCompressor().compress(change(zstandard.ZstdDecompressor().decompress(raw)))


@pytest.mark.parametrize("kind", DAMAGED_ZST)
def test_a_damaged_zst_file_is_refused(foreign: Path, kind: str) -> None:
    damage, text = DAMAGED_ZST[kind]
    file = compress(foreign / "tensors" / "a__weight__nf4.npy")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"a__weight__nf4.npy.zst ({text})"):
        load_npy_dir(foreign)


def test_every_flipped_bit_of_a_zst_file_with_a_checksum_is_found(foreign: Path) -> None:
    file = compress(foreign / "tensors" / "a__bias__pt.npy")
    raw, expected = file.read_bytes(), load_npy_dir(foreign)["a.bias"]
    for place in range(len(raw)):
        file.write_bytes(damaged_at(place)(raw))
        with suppress(ValueError):  # else it is a bit of the frame's header that says nothing
            assert load_npy_dir(foreign)["a.bias"].tolist() == expected.tolist(), place


# A directory that declares a terabyte, in every place where it could.

TERABYTES: dict[str, tuple[Callable[[Path], object], str]] = {
    "in a header": (
        lambda f: (f / "ids__pt.npy").write_bytes(npy(header("|u1", f"({TERABYTE},)"))),
        "which makes a file of 10995116278.. bytes, and has 7.",
    ),
    "in a small .zst": (
        lambda f: (
            (f / "ids__pt.npy").write_bytes(npy(header("|u1", f"({TERABYTE},)"), bytes(100))),
            compress(f / "ids__pt.npy"),
        ),
        "1099511627776 bytes, more than [0-9]+ bytes can be compressed from",
    ),
    "in a file with a hole": (
        lambda f: sparse(f / "ids__pt.npy", npy(header("<f2", f"({TERABYTE},)")), 2 * TERABYTE),
        "takes 4,398.0 GB of memory",
    ),
    "in a .zst with a hole": (
        lambda f: (
            sparse(f / "ids__pt.npy.zst", zstandard.compress(npy(header("<f2", f"({TERABYTE},)"))), 2**30),
            (f / "ids__pt.npy").unlink(),
        ),
        "takes 4,398.0 GB of memory",
    ),
    "in both halves of a tensor": (
        lambda f: (
            sparse(f / "a__weight__nf4.npy", npy(header("|u1", f"({2**20}, {2**20})")), TERABYTE),
            sparse(f / "a__weight__s_nf4.npy", npy(header("<f4", f"({2**20}, 1)")), 2**22),
            (f / "a__weight__shape.npy").unlink(),
        ),
        "takes 8,796.1 GB of memory",
    ),
    "in the shape alone": (
        replace("a__weight__shape", np.array([TERABYTE])),
        "a__weight__shape.npy is not the shape of 192 values",
    ),
    "as the length of the shape": (
        lambda f: sparse(f / "a__weight__shape.npy", npy(header("<i8", f"({2**37},)")), TERABYTE),
        f"a__weight__shape.npy says {2**37} dimensions; at most 64 are read",
    ),
}


@pytest.mark.parametrize("where", TERABYTES)
def test_a_declared_terabyte_fails_at_once(foreign: Path, where: str) -> None:
    damage, text = TERABYTES[where]
    damage(foreign / "tensors")
    with allocating_at_most(2**20), pytest.raises(ValueError, match=text):
        load_npy_dir(foreign)
    with allocating_at_most(2**20), pytest.raises(ValueError, match=text):
        dict(iter_npy_dir(foreign))


def test_a_zip_bomb_is_not_unpacked_beyond_what_it_declares(foreign: Path) -> None:
    """Half a gigabyte of zeros behind an array of 8 bytes, in 17 kB: 4 kB of them are looked at."""
    (foreign / "tensors" / "ids__pt.npy").unlink()
    bomb = zstandard.ZstdCompressor().compress(npy(header("|u1", "(8,)"), bytes(2**29)))
    (foreign / "tensors" / "ids__pt.npy.zst").write_bytes(bomb)
    assert len(bomb) < 20_000
    with allocating_at_most(2**28), pytest.raises(ValueError, match=r"ids__pt.npy.zst declares .* and holds more"):
        load_npy_dir(foreign)


def test_more_than_the_machine_has_is_refused_before_it_is_read(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable: 0 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(
        ValueError, match=r"dir, read at once .* 'a.weight'; iter_npy_dir .* takes 0.0 GB of memory; 0.0 GB are free"
    ):
        load_npy_dir(foreign)
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "absent")  # a system that does not say
    assert len(load_npy_dir(foreign)) == 3


def test_a_change_of_dtype_at_the_same_size_counts_as_memory(tmp_path: Path) -> None:
    path = write_foreign_dir(tmp_path / "dir", {"x__pt": np.ones(1000, np.float16)}, {"x": "x"})
    stored = open_directory(path).tensors["x"]
    assert [stored.bytes_as(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [2000, 0, 4000]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["nf4", "kept"])
def test_reading_takes_no_more_memory_than_was_asked_for(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Decoding to 8 bits went through float32, and a check for lost values through masks, of the whole tensor."""
    arrays = {
        "nf4__nf4": np.full((2**10, 2**12), 0x7F, np.uint8),
        "nf4__s_nf4": np.ones((2**10, 2**6), np.float32),
        "kept__pt": np.ones((2**10, 2**13), np.float32),
    }
    stored = open_directory(write_foreign_dir(tmp_path / "dir", arrays, {kind: kind})).tensors[kind]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tensor = stored.read(dtype)
    assert tensor.shape == (2**10, 2**13)
    assert peak_of(profiled) <= stored.nbytes + stored.bytes_as(dtype) + 16 * AT_ONCE  # torch counts mapped files too


def peak_of(profiled: profile) -> int:
    """Bytes that torch held at most, of those that it took while it was watched."""
    held = highest = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("key", ["../a", "/a", "a/b", "a\\b", "C:a", "", "a\0b", "\ud800", ".."])
def test_a_manifest_key_that_is_no_file_name_is_refused(tmp_path: Path, key: str) -> None:
    path = write_foreign_dir(tmp_path / "dir", {}, {"name": key})
    assert_refused(path, "tensor 'name'")


@pytest.mark.parametrize("what", ["a__weight__nf4.npy", "a__weight__shape.npy"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_link_out_of_the_directory_is_refused(foreign: Path, what: str, relative: bool) -> None:
    file = foreign / "tensors" / what
    outside = foreign.parent / what
    file.rename(outside)
    file.symlink_to(Path("../..") / what if relative else outside)
    assert_refused(foreign, f"{what} is a link out of the directory, to .*; copy the directory with its links followed")


def test_a_link_of_the_whole_folder_out_of_the_directory_is_refused(foreign: Path) -> None:
    (foreign / "tensors").rename(foreign.parent / "elsewhere")
    (foreign / "tensors").symlink_to(foreign.parent / "elsewhere")
    assert_refused(foreign, "tensors is a link out of the directory, to .*elsewhere")


@pytest.mark.parametrize("table", ["manifest.json", "squish_nf4.json"])
def test_a_table_that_is_a_link_out_is_refused(own: Path, table: str) -> None:
    (own / table).rename(own.parent / table)
    (own / table).symlink_to(own.parent / table)
    assert_refused(own, f"{table} is a link out of the directory")


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ("", "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read: it is not a JSON object"),
        ("[" * 100_000, "manifest.json cannot be read: it is nested more than 16 levels deep"),
        ("\xff", "manifest.json cannot be read"),
        ('{"a": 3}', "the key of 'a' is not a string"),
        ('{"a": "x", "a": "y"}', "manifest.json cannot be read: 'a' is there twice"),
        ('{"a.b": "a__b", "a__b": "a__b"}', "'a.b', 'a__b' share the key 'a__b', and nothing says that they are tied"),
    ],
)
def test_a_damaged_manifest_is_refused(foreign: Path, manifest: str, text: str) -> None:
    (foreign / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert_refused(foreign, text)


def test_a_missing_or_enormous_manifest_is_refused(foreign: Path) -> None:
    sparse(foreign / "manifest.json", b"{", 2**33 - 1)
    assert_refused(foreign, r"manifest.json cannot be read: it has 8589934592 bytes; at most 536870912 are read")
    (foreign / "manifest.json").unlink()
    assert_refused(foreign, r"manifest.json cannot be read: it is not there")


def test_a_tensor_without_files_is_refused(tmp_path: Path) -> None:
    assert_refused(write_foreign_dir(tmp_path / "dir", {}, {"a": "a"}), r"tensor 'a': .*found: nothing$")


def test_the_files_of_other_forms_are_listed_without_those_of_other_tensors(tmp_path: Path) -> None:
    arrays = {"a__q": np.ones(1), "a__s": np.ones(1), "a__b__pt": np.ones(1)}
    path = write_foreign_dir(tmp_path / "dir", arrays, {"a": "a", "a.b": "a__b"})
    assert_refused(path, r"tensor 'a': wanted are .*; found: __q.npy, __s.npy$")


LOAD = "import sys; from squish_nf4 import load_npy_dir; load_npy_dir(sys.argv[1])"


@pytest.mark.sweeps
def test_a_name_that_is_there_twice_is_found_in_one_pass_over_the_table(foreign: Path) -> None:
    """A pass for each of the names would take hours: nothing but the child's last resort would end it."""
    table = ", ".join(f'"{number:06}": "k"' for number in [*range(1_000_000), 999_999])
    (foreign / "manifest.json").write_text(f"{{{table}}}")
    assert run_python(LOAD, foreign, check=False).endswith("'999999' is there twice")


def test_every_bad_tensor_is_told_in_steps_that_grow_with_the_folder(tmp_path: Path) -> None:
    taken = []
    for count in (250, 1000):
        path = write_foreign_dir(tmp_path / f"{count}", {}, {f"t{number}": f"t{number}" for number in range(count)})
        for number in range(count):
            (path / "tensors" / f"t{number}__q.npy").touch()
        report, steps = steps_of(lambda path=path: verify(path))
        taken.append(steps)
        assert len(report.problems) == count
        assert report.problems[7].startswith("tensor 't7': ")
        assert report.problems[7].endswith("; found: __q.npy")
    assert 3 < taken[1] / taken[0] < 5, taken  # a pass over the folder for every tensor: 16


def steps_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how many of Python's instructions it took: its time, but on any machine."""
    steps = 0

    def enter(frame: FrameType, *_: object) -> Callable[..., Any]:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    def step(_: FrameType, event: str, __: object) -> Callable[..., Any]:
        nonlocal steps
        steps += event == "opcode"
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        result = function()
    finally:
        sys.settrace(before)
    return result, steps


def change_record(**changes: object) -> Callable[[Path], object]:
    """Of the tensor w, in squish_nf4.json."""

    def change(own: Path) -> None:
        table = json.loads((own / "squish_nf4.json").read_text())
        table["tensors"]["w"] |= changes
        (own / "squish_nf4.json").write_text(json.dumps(table))

    return change


AT_ODDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (
        change_record(kind="kept"),
        "'w': .*squish_nf4.json records kind 'kept', and its files have 'nf4'",
    ),
    "another shape": (change_record(shape=[64, 4]), r"records shape \[64, 4\], and its files have \[4, 64\]"),
    "another group size": (change_record(group_size=16), "records group_size 16, and its files have 32"),
    "another size": (
        change_record(files={"w__nf4.npy": {"bytes": 7}}),
        "w__nf4.npy has 256 bytes; squish_nf4.json records 7",
    ),
    "files of no object": (change_record(files={"w__nf4.npy": 3}), "w__nf4.npy has 256 bytes"),
    "tied to itself": (change_record(tied_to="w"), "'w' is tied to 'w', which has other files"),
    "tied to another": (change_record(tied_to="b"), "'w' is tied to 'b', which has other files"),
    "tied to no string": (change_record(tied_to=[1]), r"'w' is tied to \[1\], which has other files"),
    "a tensor that the manifest lost": (
        lambda own: (own / "manifest.json").write_text('{"w": "w"}'),
        "squish_nf4.json records tensors that manifest.json does not name: 'b'",
    ),
    "a file of no tensor": (
        replace("tensors/x__pt", np.ones(3)),
        "tensors holds files of no tensor that manifest.json names: 'x__pt.npy'",
    ),
    "no JSON": (lambda own: (own / "squish_nf4.json").write_text("{"), "squish_nf4.json cannot be read"),
    "no tensors": (lambda own: (own / "squish_nf4.json").write_text("{}"), "squish_nf4.json records no tensors"),
    "a list of tensors": (
        lambda own: (own / "squish_nf4.json").write_text('{"tensors": ["w"]}'),
        "squish_nf4.json records no tensors",
    ),
}


@pytest.mark.parametrize("kind", AT_ODDS)
def test_a_sidecar_at_odds_with_the_files_is_refused(own: Path, kind: str) -> None:
    assert load_npy_dir(own).keys() == {"w", "b"}
    damage, text = AT_ODDS[kind]
    damage(own)
    assert_refused(own, text)


def test_other_writers_extra_files_are_none_of_our_business(foreign: Path) -> None:
    folder = foreign / "tensors"
    for name in ("x__pt.npy", "x__q.npy", "a__weight__zero.npy", ".DS_Store", "notes.txt"):
        (folder / name).write_bytes(b"anything")
    (folder / "more").mkdir()
    assert load_npy_dir(foreign).keys() == MANIFEST.keys()
