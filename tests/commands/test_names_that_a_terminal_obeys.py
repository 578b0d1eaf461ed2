"""Names that move a cursor, colour a line or begin a new one: printed quoted by every command, and in every report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from squish_nf4 import convert, iter_npy_dir, load_into, load_npy_dir
from squish_nf4.checkpoint.conversion import run
from squish_nf4.checkpoint.conversion.output import Output
from squish_nf4.checkpoint.directory.format import JOURNAL
from squish_nf4.checkpoint.messages import shown, visible
from squish_nf4.commands.cli import app
from tests.support.directories import gaussian, save_index, save_shard

NAMES = ["a\x1b[2J.weight", "b\nsound: all right.weight", "c\r\x07d.weight", "e\u202egnp.bias", "f\x9b31m.weight"]
QUOTED = [r"'a\x1b[2J.weight'", r"'b\nsound: all right.weight'", r"'c\r\x07d.weight'", r"'e\u202egnp.bias'"]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {name: gaussian(*((4, 64) if "weight" in name else (5,)), seed=seed) for name in NAMES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("out", "other")):
        convert(save_shard(tmp_path / f"{name}.safetensors", tensors(seed)), tmp_path / name)
    convert(save_shard(tmp_path / "few.safetensors", {"x": gaussian(4)}), tmp_path / "few")
    return tmp_path


def output(*args: str | Path) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def commands(folder: Path) -> Iterator[str]:
    out, other, shard = folder / "out", folder / "other", folder / "out.safetensors"
    yield output("convert", "--nf4", "--dry-run", shard)
    yield output("convert", "--nf4", shard, folder / "new", "--passthrough", "a")
    yield output("convert", "--nf4", "--json", shard, folder / "newer")
    yield output("inspect", out)
    yield output("diff", out, other)
    yield output("diff", out, folder / "few")
    yield output("verify", out, "--source", folder / "other.safetensors")
    for file in (out / "tensors").glob("*nf4.npy"):
        file.write_bytes(b"")
    yield output("verify", out)
    yield output("inspect", out)
    yield output("diff", out, other)
    yield output("inspect", folder / "no\x1b[31mthing")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as refused:
        call()
    return str(refused.value)


def test_no_error_of_a_conversion_says_them_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, out = folder / "out.safetensors", folder / "begun"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(shard, out)
    for file in out.glob("tensors/*__s_nf4.npy"):
        file.write_bytes(b"")
    said = [refusal(lambda way=way: convert(shard, out, **{way: True})) for way in ("resume", "overwrite")]
    header, _, facts = (out / JOURNAL).read_bytes().partition(b"\n")
    table = json.loads(header)
    for what in ({"ultra": "\x1b[2J"}, {"\x1b[2J" + 999 * "x": 1}):
        changed = json.dumps(table | {"options": table["options"] | what}).encode()
        (out / JOURNAL).write_bytes(changed + b"\n" + facts)
        said.append(refusal(lambda: convert(shard, out, resume=True)))
    with monkeypatch.context() as patch:
        patch.setattr(run, "sha256_on_disk", lambda _: "")
        said.append(refusal(lambda: convert(shard, folder / "new", delete_source=True)))
    for name in ("\x1b[2J.safetensors", 999 * "x" + ".safetensors"):
        (folder / "model").mkdir(exist_ok=True)
        save_index(folder / "model", {"x": name})
        said.append(refusal(lambda: convert(folder / "model", folder / "newest")))
    files = json.loads((folder / "out" / "squish_nf4.json").read_text())
    for record in files["tensors"].values():
        record["files"] = {"\x1b[2J" + 999 * "x": {"bytes": "\x1b[2J" + 999 * "x"}}
    (folder / "out" / "squish_nf4.json").write_text(json.dumps(files))
    said.append(refusal(lambda: load_npy_dir(folder / "out")))
    assert all(text.isprintable() and len(text) < 800 for text in said), said
    assert len(said) == 8


def test_no_command_prints_them_as_they_are(folder: Path) -> None:
    printed = list(commands(folder))
    for text in printed:
        assert text
        assert all(character.isprintable() or character == "\n" for character in text), repr(text)
        assert not re.search("^sound", text, re.MULTILINE)
    for name in QUOTED:
        assert any(name in text for text in printed), name


def test_reports_and_errors_of_the_library_quote_them(folder: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in NAMES[:4]:
                part, attribute = name.rsplit(".", 1)
                self.add_module(part, nn.Module())
                self.get_submodule(part).register_buffer(attribute, torch.zeros(4, 64 if "weight" in name else 1))

    report = str(load_into(Model(), folder / "few", strict=False))
    assert all(f"missing: {name}" in report for name in QUOTED)
    assert len(report.splitlines()) == 6  # a line of counts, four names and x
    sentences = [refusal_of(lambda: load_into(Model(), folder / "out", strict=False))]
    for file in (folder / "out" / "tensors").glob("*nf4.npy"):
        file.write_bytes(file.read_bytes()[:-1])
        sentences.append(refusal_of(lambda: load_npy_dir(folder / "out")))
    tensors = iter_npy_dir(folder / "other")
    for file in (folder / "other" / "tensors").glob("*.npy"):
        file.unlink()
    sentences.append(refusal_of(lambda: list(tensors)))
    assert all(sentence.isprintable() for sentence in sentences), sentences


def refusal_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"tensor '|in the model") as refused:
        call()
    return str(refused.value)


@pytest.mark.parametrize("name", ["model.layers.0.weight", "größe", "重み", "", "with space", "it's", "[bold]w"])
def test_an_ordinary_name_is_shown_as_it_is(name: str) -> None:
    assert shown(name) == name
    assert visible(name) == name
