"""verify: damage of every kind is found and named, what is sound is said to be, the source decides to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from squish_nf4.checkpoint.audit.verify import verify
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.commands.cli import app
from tests.support.directories import compress, gaussian, replace, save_shard, write_small_dir

TENSORS = {
    "w": gaussian(6, 64),
    "stack": gaussian(2, 3, 48, dtype=torch.bfloat16),
    "wide": gaussian(4, 64, dtype=torch.float64),
    "bias": torch.tensor([1.5, float("nan"), -0.0]),
    "narrow": gaussian(7, dtype=torch.bfloat16),
    "ids": torch.arange(4),
    "flag": torch.tensor(True),
    "none": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    save_shard(folder / "model.safetensors", TENSORS)
    convert(folder / "model.safetensors", folder / "dir")
    return folder / "dir", folder / "model.safetensors"


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A directory to damage, and its source."""
    return Path(shutil.copytree(made[0], tmp_path / "dir")), made[1]


def test_what_convert_wrote_is_sound(made: tuple[Path, Path]) -> None:
    report = verify(*made)
    assert report.sound, report.problems
    assert (report.tensors, report.requantized, report.equal, report.notes) == (8, 3, 5, [])
    assert report.files == report.checksums == len(list((made[0] / "tensors").glob("*.npy")))
    assert report.nbytes == sum(file.stat().st_size for file in (made[0] / "tensors").glob("*.npy"))


def test_without_the_source_it_is_checked_by_itself(made: tuple[Path, Path]) -> None:
    report = verify(made[0])
    assert report.sound
    assert report.source is None
    assert report.checksums == report.files
    assert report.requantized == report.equal == 0


def test_progress_goes_from_nothing_to_all_but_the_last(made: tuple[Path, Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    verify(*made, progress=lambda p: steps.append((p.tensor, p.bytes_done, p.bytes_total)))
    assert [name for name, _, _ in steps] == [*TENSORS_AS_STORED, *TENSORS_AS_STORED]
    done = [bytes_done for _, bytes_done, _ in steps]
    assert done[0] == 0
    assert done == sorted(done)
    assert all(bytes_done <= total for _, bytes_done, total in steps)


TENSORS_AS_STORED = sorted(TENSORS)  # safetensors sorts by name


def test_another_writers_directory_is_checked_without_checksums(tmp_path: Path) -> None:
    path = write_small_dir(tmp_path / "dir")
    (path / "tensors" / "x__pt.npy").touch()
    report = verify(path)
    assert report.sound
    assert report.checksums == 0
    assert report.notes == [
        "there is no squish_nf4.json: another program wrote it, and no checksum is known",
        "files of no tensor that the manifest names: 'x__pt.npy'",
    ]


def flip(name: str, place: int, bit: int = 1) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "tensors" / name
        raw = bytearray(file.read_bytes())
        raw[place] ^= bit
        file.write_bytes(raw)

    return change


def change_record(name: str, **changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        table = json.loads((path / "squish_nf4.json").read_text())
        table["tensors"][name] |= changes
        (path / "squish_nf4.json").write_text(json.dumps(table))

    return change


def forget(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        table = json.loads((path / "squish_nf4.json").read_text())
        del table["tensors"][name]
        (path / "squish_nf4.json").write_text(json.dumps(table))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped bit": (flip("w__nf4.npy", -1), [r"w__nf4.npy is damaged: its SHA-256 is"]),
    "a missing file": (
        lambda path: (path / "tensors" / "w__s_nf4.npy").unlink(),
        ["tensor 'w': wanted are w__nf4.npy with w__s_nf4.npy"],
    ),
    "two damaged tensors": (
        lambda path: (flip("w__nf4.npy", -1)(path), (path / "tensors" / "ids__pt.npy").write_bytes(b"")),
        ["tensor 'ids': .*is no .npy file", "tensor 'w': .*is damaged"],
    ),
    "a tensor without a record": (forget("w"), ["squish_nf4.json does not record 'w'"]),
    "a record without checksums": (
        change_record("ids", files={"ids__pt.npy": {"bytes": 160}, "ids__shape.npy": {"bytes": 136, "sha256": 3}}),
        ["ids__pt.npy has no SHA-256 in squish_nf4.json", "ids__shape.npy has no SHA-256 in squish_nf4.json"],
    ),
    "another group size on record": (change_record("w", group_size=16), ["records group_size 16"]),
    "an extra file": (replace("tensors/x__pt", np.ones(3)), ["holds files of no tensor .*'x__pt.npy'"]),
    "no end": (
        lambda path: (path / "tensors" / ".manifest_ready").unlink(),
        ["is not a finished squish directory"],
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), ["manifest.json cannot be read"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_problem_is_found_and_named(copied: tuple[Path, Path], kind: str) -> None:
    damage, texts = DAMAGE[kind]
    damage(copied[0])
    report = verify(copied[0])
    assert not report.sound
    assert len(report.problems) == len(texts), report.problems
    for problem, text in zip(report.problems, texts, strict=True):
        with pytest.raises(ValueError, match=text):
            raise ValueError(problem)


@pytest.fixture
def with_config(tmp_path: Path) -> Path:
    """A directory with config.json and more/notes.txt copied along."""
    (tmp_path / "source" / "more").mkdir(parents=True)
    save_shard(tmp_path / "source" / "model.safetensors", {"w": TENSORS["w"]})
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "more" / "notes.txt").write_text("notes")
    convert(tmp_path / "source", tmp_path / "dir")
    return tmp_path / "dir"


COPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (lambda path: (path / "config.json").write_text('{"a": 1}'), "config.json is damaged: its SHA-256 is"),
    "removed": (lambda path: (path / "more" / "notes.txt").unlink(), "notes.txt is missing; squish_nf4.json records"),
    "a folder": (
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        "config.json is not a regular file",
    ),
    "outside": (
        lambda path: change_copied(path, {"../source/config.json": {"sha256": "0"}}),
        r"lists a file of its own, '../source/config.json', that lies outside it",
    ),
    "without a checksum": (
        lambda path: change_copied(path, {"config.json": 3}),
        "config.json has no SHA-256 in squish_nf4.json",
    ),
}


def change_copied(path: Path, copied: object) -> None:
    table = json.loads((path / "squish_nf4.json").read_text())
    (path / "squish_nf4.json").write_text(json.dumps(table | {"copied": copied}))


@pytest.mark.parametrize("kind", COPIED)
def test_small_files_are_held_to_their_checksums(with_config: Path, kind: str) -> None:
    report = verify(with_config)
    assert (report.problems, report.files, report.checksums) == ([], 5, 5)
    damage, text = COPIED[kind]
    damage(with_config)
    [problem] = verify(with_config).problems
    assert text in problem


def test_a_record_without_files_is_noted(copied: tuple[Path, Path]) -> None:
    table = json.loads((copied[0] / "squish_nf4.json").read_text())
    del table["tensors"]["w"]["files"]
    (copied[0] / "squish_nf4.json").write_text(json.dumps(table))
    report = verify(copied[0])
    assert report.sound
    assert report.checksums == report.files - 3
    assert report.notes == ["squish_nf4.json records no files, and so no checksum, of 'w'"]


def test_scales_that_are_not_finite_are_a_problem(tmp_path: Path) -> None:
    path = write_small_dir(tmp_path / "dir")
    scales = np.load(path / "tensors" / "a__weight__s_nf4.npy")
    scales[2, 1] = np.nan
    scales[4, 0] = np.inf
    np.save(path / "tensors" / "a__weight__s_nf4.npy", scales)
    assert verify(path).problems == [
        "tensor 'a.weight': 2 groups have no finite scale, the first in row 2, group 1: nan"
    ]


def test_a_compressed_file_is_unpacked_to_be_checked(tmp_path: Path) -> None:
    path = write_small_dir(tmp_path / "dir")
    file = compress(path / "tensors" / "ids__pt.npy")
    assert verify(path).sound
    file.write_bytes(file.read_bytes()[:-2])
    [problem] = verify(path).problems
    assert "ids__pt.npy.zst is cut off" in problem


def without_sidecar(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage that no checksum gives away: only the source can."""
    return lambda path: (change(path), (path / "squish_nf4.json").unlink())[0]


AGAINST_SOURCE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a nibble": (flip("stack__nf4.npy", 128 + 24 * 4 + 5, 0x30), r"'stack': \[1, 1, 11\] is stored as index "),
    "a scale": (flip("w__s_nf4.npy", 128 + 4 * 5), r"'w': row 2, group 1 has the scale "),
    "a double's nibble": (flip("wide__nf4.npy", -1, 0x10), r"'wide': \[3, 63\] is stored as index "),
    "a sign of zero": (flip("bias__pt.npy", -1, 0x80), r"'bias': \[2\] is 0\.0; the source has -0\.0"),
    "a bfloat16": (flip("narrow__pt.npy", -2), r"'narrow': \[6\] is .*; the source has"),
    "an integer": (flip("ids__pt.npy", -8), r"'ids': \[3\] is 2; the source has 3"),
    "a scalar": (flip("flag__pt.npy", -1), r"'flag': \[\] is False; the source has True"),
    "another type": (
        replace("tensors/ids__pt", np.arange(4, dtype=np.int32)),
        "'ids': is stored as int32; the source has int64",
    ),
    "another shape": (
        lambda path: np.save(path / "tensors" / "w__shape.npy", np.array([64, 6])),
        r"'w': has shape \(64, 6\); the source has \(6, 64\)",
    ),
    "integers in NF4": (
        lambda path: (
            [
                shutil.copy(path / "tensors" / f"w{end}.npy", path / "tensors" / f"ids{end}.npy")
                for end in ("__nf4", "__s_nf4", "__shape")
            ]
            and (path / "tensors" / "ids__pt.npy").unlink()
        ),
        r"'ids': has shape \(6, 64\); the source has \(4,\)",
    ),
}


@pytest.mark.parametrize("kind", AGAINST_SOURCE)
def test_the_source_decides_to_the_last_bit(copied: tuple[Path, Path], kind: str) -> None:
    path, source = copied
    damage, text = AGAINST_SOURCE[kind]
    without_sidecar(damage)(path)
    assert verify(path).sound
    report = verify(path, source)
    [problem] = report.problems
    with pytest.raises(ValueError, match=text):
        raise ValueError(problem)
    assert report.requantized + report.equal == len(TENSORS) - 1


def test_a_source_of_other_tensors_is_told(made: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(made[1])
    tensors["more"] = tensors.pop("w")
    tensors["ids"] = tensors["ids"].int()
    save_file(tensors, tmp_path / "other.safetensors")
    assert verify(made[0], tmp_path / "other.safetensors").problems == [
        f"not in {made[0]}, but in the source: 'more'",
        f"in {made[0]}, but not in the source: 'w'",
        "tensor 'ids': is recorded to have been int64; the source has int32",
    ]


def test_tied_names_are_both_compared_with_the_source(tmp_path: Path) -> None:
    w = gaussian(6, 64)
    save_file({"a": w, "b": w.clone()}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "dir")
    for end in ("__nf4", "__s_nf4", "__shape"):
        (tmp_path / "dir" / "tensors" / f"b{end}.npy").unlink(missing_ok=True)
    (tmp_path / "dir" / "manifest.json").write_text('{"a": "a", "b": "a"}')
    (tmp_path / "dir" / "squish_nf4.json").unlink()
    report = verify(tmp_path / "dir", tmp_path / "model.safetensors")
    assert report.sound
    assert (report.tensors, report.requantized) == (1, 2)


def test_the_command_says_so_and_ends_with_0_or_1(copied: tuple[Path, Path]) -> None:
    path, source = copied
    done = CliRunner().invoke(app, ["verify", str(path), "--source", str(source)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"{path} is sound: 8 tensors in 19 files" in done.stdout
    assert "19 checksums right" in done.stdout
    assert "3 quantized again to the same bytes, 5 kept with the same values" in done.stdout
    flip("w__nf4.npy", -1)(path)
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.startswith("Wrong: tensor 'w': ")
    assert f"{path} has 1 problem: " in done.stdout


def test_the_command_needs_a_directory(tmp_path: Path) -> None:
    for args, text in (
        ([tmp_path / "absent"], "absent is not a directory"),
        ([tmp_path, "--source", tmp_path / "gone"], "gone does not exist"),
    ):
        done = CliRunner().invoke(app, ["verify", *map(str, args)])
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("squish-nf4: ")
        assert done.stderr.endswith(f"{text}\n")
