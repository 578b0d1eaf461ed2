"""A disk that fills at any moment of a conversion: what is left, what is said, and that resume goes on."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from squish_nf4.checkpoint.conversion import journal
from squish_nf4.checkpoint.conversion.convert import UnfinishedError, convert
from tests.support.directories import contents, gaussian, is_finished, save_index, save_shard

JOURNAL = "squish_nf4.journal"
SPIKY = gaussian(8, 64)
SPIKY[1, 1] = 1e4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    save_shard(directory / "1.safetensors", {"a": gaussian(8, 64), "steps": torch.arange(4)})
    save_shard(directory / "2.safetensors", {"spiky": SPIKY, "tied": gaussian(8, 64)})
    save_index(directory, {"a": "1.safetensors"})
    (directory / "config.json").write_text("{}")
    (directory / "more").mkdir()
    (directory / "more" / "vocab.txt").write_text("a\nb\n")
    return directory


class Disk:
    """The system's calls that take room, of which so many are done and no more; removing a file always works.

    names: whether a name takes room, too: a new file, a folder, a rename.
    """

    def __init__(self, patch: pytest.MonkeyPatch, calls: int, *, names: bool) -> None:
        self.calls = calls
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.take()
                data = memoryview(data).cast("B")
                return super().write(data if disk.calls else data[: -(-len(data) // 2)])  # the last one takes half

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any) -> Any:
            if "x" not in mode and "w" not in mode:
                return open_as_ever(file, mode, buffering, *args)
            if names:
                disk.take()
            buffered = io.BufferedWriter(File(file, mode.replace("b", "")))
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args)

        open_as_ever = io.open
        patch.setattr(io, "open", opened)
        patch.setattr(journal, "FileIO", File)
        patch.setattr(os, "fsync", self.taking(os.fsync))
        if names:
            for name in ("rename", "replace", "mkdir"):
                patch.setattr(Path, name, self.taking(getattr(Path, name)))

    def taking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*args: Any, **kwargs: Any) -> Any:
            self.take()
            return call(*args, **kwargs)

        return taken

    def take(self) -> None:
        if self.calls <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.calls -= 1


def parts_beyond_the_journal(out: Path) -> set[str]:
    lines = (out / JOURNAL).read_bytes().splitlines() if (out / JOURNAL).exists() else []
    known = {part for line in lines[1:] for part in json.loads(line).get("parts", {}).values()}
    return {file.name for file in out.rglob("*.part")} - known


@pytest.mark.parametrize(
    ("names", "overwrite"), [(False, False), (True, True)], ids=["bytes, anew", "bytes and names, overwriting"]
)
def test_a_disk_that_is_full_at_any_moment_leaves_no_part_that_is_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: bool, overwrite: bool
) -> None:
    options: dict[str, Any] = {"min_free_gb": 0, "ultra": True}
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a disk is slow
    convert(source, tmp_path / "expected", **options)
    expected = contents(tmp_path / "expected")
    for calls in count():
        out = tmp_path / f"out{calls}"
        if overwrite:
            convert(source, out, **options)
        with monkeypatch.context() as patch:
            Disk(patch, calls, names=names)
            error = error_of(source, out, overwrite=overwrite, **options)
        assert not parts_beyond_the_journal(out), calls
        unfinished = (out / JOURNAL).exists()
        assert isinstance(error, UnfinishedError) == unfinished, calls
        assert unfinished or is_finished(out) == (overwrite or error is None), calls
        if error is not None:
            assert "No space left on device" in str(error), calls
            assert "\n" not in str(error), calls
            assert ("resume goes on with it" in str(error)) == unfinished, calls
        if not is_finished(out) or unfinished:
            convert(source, out, resume=True, **options)
        assert contents(out) == expected, calls
        if error is None:
            break
    assert calls > 30


def error_of(source: Path, out: Path, **options: Any) -> OSError | None:
    try:
        convert(source, out, **options)
    except OSError as error:
        return error
    return None
