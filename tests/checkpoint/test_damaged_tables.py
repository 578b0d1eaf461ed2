"""The journal and the tables damaged at random: a sentence that says where, or a damage that does not matter."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from squish_nf4.checkpoint.audit.diff import diff
from squish_nf4.checkpoint.audit.inspection import inspect
from squish_nf4.checkpoint.audit.verify import verify
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.conversion.forms import is_number
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from tests.support.directories import gaussian, save_shard

JOURNAL = "squish_nf4.journal"
DAMAGES = 60  # of each table
STRANGE = [None, True, -1, 0, 7, 1.5, float("nan"), float("inf"), 10**400, "", "x", "../x", "\ud800", "a\0", "float32"]
STRANGE += [[], [[]], {}, {"x": 1}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a finished conversion of it, and one that lacks its last step."""
    path = tmp_path_factory.mktemp("model")
    spiky = gaussian(8, 64)
    spiky[1, 1] = 1e4
    save_shard(path / "source" / "1.safetensors", {"a": gaussian(8, 64), "steps": torch.arange(4)})
    save_shard(path / "source" / "2.safetensors", {"spiky": spiky, "tied": gaussian(8, 64)})
    (path / "source" / "config.json").write_text("{}")
    convert(path / "source", path / "finished", ultra=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(path / "source", path / "unfinished", ultra=True)
    return path


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[name], (*place, name))


def damage_value(value: Any, chance: random.Random) -> Any:
    """One of the values in it removed, renamed or replaced."""
    *way, last = chance.choice(list(places(value))) or ("",)
    holder = value
    for name in way:
        holder = holder[name]
    match chance.randrange(3):
        case 0 if last != "":
            del holder[last]
        case 1 if isinstance(holder, dict) and last != "":
            holder[chance.choice(["x", "a", "../x", "tied_to"])] = holder.pop(last)
        case _ if last != "":
            holder[last] = chance.choice(STRANGE)
        case _:
            return chance.choice(STRANGE)
    return value


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    place, length = chance.randrange(len(data)), chance.randrange(1, 20)
    flipped = bytes([data[place] ^ 1 << chance.randrange(8)])
    return chance.choice(
        [
            data[:place] + flipped + data[place + 1 :],
            data[:place] + data[place + length :],
            data[:place] + data[place : place + length] + data[place:],
            data[:place],
        ]
    )


def damaged(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    if seed % 3 == 0:
        return damage_bytes(data, chance)
    lines = [json.loads(line) for line in data.splitlines()] if data.count(b"\n{") else [json.loads(data)]
    at = chance.choice([0, chance.randrange(len(lines))])
    lines[at] = damage_value(lines[at], chance)
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except (ValueError, OSError) as error:  # anything else is a traceback for whoever types the command
        assert not isinstance(error, UnicodeError)  # noqa: PT017 (a refusal or none, both are right)
        return str(error)
    return None


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_a_damaged_journal_is_refused_in_a_sentence_or_does_not_matter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    said = []
    for seed in range(DAMAGES):
        out = shutil.copytree(model / "unfinished", tmp_path / f"out{seed}")
        (out / JOURNAL).write_bytes(damaged((out / JOURNAL).read_bytes(), seed))
        text = refusal(lambda out=out: convert(model / "source", out, ultra=True, min_free_gb=0, **options))
        if text is None:
            assert verify(out, model / "source").sound, seed
        else:
            said.append(text)
            assert f"out{seed}" in text, (seed, text)
            assert "\n" not in text, (seed, text)
            assert any(way in text for way in ("remove", "move it away", "as it was begun")), (seed, text)
    assert len(said) > DAMAGES / 2


@pytest.mark.parametrize("table", ["squish_nf4.json", "manifest.json"])
def test_a_damaged_table_is_refused_in_a_sentence_or_does_not_matter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    calls: list[Callable[[Path], object]] = [
        lambda out: str(verify(out, model / "source")),
        load_npy_dir,
        lambda out: load_npy_dir(out, "source"),
        lambda out: str(diff(out, model / "finished")),
        lambda out: str(inspect(out)),
        lambda out: convert(model / "source", out, ultra=True, min_free_gb=0, overwrite=True),  # last: it replaces all
    ]
    for seed in range(DAMAGES):
        out = shutil.copytree(model / "finished", tmp_path / f"out{seed}")
        (out / table).write_bytes(damaged((out / table).read_bytes(), seed))
        for call in calls:
            text = refusal(lambda call=call, out=out: call(out))
            assert text is None or ("\n" not in text and ("out" in text or "tensor" in text)), (seed, text)


def test_a_number_is_finite_and_not_negative() -> None:
    """What squish_nf4.json could not hold in the end."""
    assert all(map(is_number, (0, 7, 0.0, 0.5)))
    assert not any(map(is_number, (math.nan, math.inf, -1, -0.5, True, "1", None, 10**400)))


def test_a_journal_of_another_version_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    out = shutil.copytree(model / "unfinished", tmp_path / "out")
    header, *facts = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    later = json.dumps(json.loads(header) | {"journal": 99}).encode() + b"\n"
    (out / JOURNAL).write_bytes(later + b"".join(facts))
    with pytest.raises(ValueError, match=r"squish_nf4.journal is damaged, or another version's: its line 1"):
        convert(model / "source", out, ultra=True, resume=True)
