"""A squish directory that is written anew while it is read: no reader mixes the old one with the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from squish_nf4.checkpoint.audit import diff as diff_module
from squish_nf4.checkpoint.audit import inspection
from squish_nf4.checkpoint.audit import verify as verify_module
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory import reader
from squish_nf4.checkpoint.directory.reader import iter_npy_dir, load_npy_dir
from squish_nf4.checkpoint.loading import load_into as loading
from tests.support.directories import gaussian, save_shard

CHANGED = r"out has changed since it was opened: another program writes to it"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 8)
        self.norm = nn.LayerNorm(64)


def write(tmp_path: Path, seed: int) -> Path:
    """The directory of a checkpoint, in the place of any other."""
    tensors = {name: gaussian(*tensor.shape, seed=seed) for name, tensor in Model().state_dict().items()}
    source = save_shard(tmp_path / f"{seed}.safetensors", tensors)
    convert(source, tmp_path / "out", overwrite=(tmp_path / "out").exists())
    return tmp_path / "out"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write(tmp_path, 1)


def when_called(monkeypatch: pytest.MonkeyPatch, room: object, name: str, act: Callable[[], object]) -> None:
    """Does something once, as a function of a module begins."""
    function, left = getattr(room, name), [act]

    def first(*args: object, **kwargs: object) -> object:
        if left:
            left.pop()()
        return function(*args, **kwargs)

    monkeypatch.setattr(room, name, first)


def test_the_iterator_stops_at_the_first_tensor_of_another_checkpoint(tmp_path: Path, out: Path) -> None:
    expected = load_npy_dir(out)
    tensors = iter_npy_dir(out)
    name, first = next(tensors)
    write(tmp_path, 2)
    with pytest.raises(ValueError, match=CHANGED):
        next(tensors)
    assert torch.equal(first, expected[name])
    assert not torch.equal(load_npy_dir(out)[name], first)


@pytest.mark.parametrize("when", ["find_owners", "open_tensor", "require_memory"])
def test_a_directory_that_is_replaced_while_it_is_loaded_is_refused(
    tmp_path: Path, out: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    when_called(monkeypatch, reader, when, lambda: write(tmp_path, 2))
    with pytest.raises(ValueError, match=CHANGED):
        load_npy_dir(out)


def test_a_directory_that_is_gone_while_it_is_loaded_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when_called(monkeypatch, reader, "require_memory", lambda: out.rename(out.with_name("away")))
    with pytest.raises(ValueError, match=CHANGED):
        load_npy_dir(out)


@pytest.mark.parametrize("when", ["pair", "prepare"])
def test_load_into_refuses_it_and_leaves_the_model_as_it_was(
    tmp_path: Path, out: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    when_called(monkeypatch, loading, when, lambda: write(tmp_path, 2))
    with pytest.raises(ValueError, match=rf"^load_into: .*{CHANGED}.*\(the model was not changed\)"):
        loading.load_into(model, out)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: kept[0] for name, kept in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_those_who_look_at_a_directory_say_so_too(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = convert(tmp_path / "1.safetensors", tmp_path / "other").output
    when_called(monkeypatch, diff_module, "diff_tensor", lambda: write(tmp_path, 2))
    with pytest.raises(ValueError, match=CHANGED):
        diff_module.diff(other, out)
    when_called(monkeypatch, inspection, "measure", lambda: write(tmp_path, 3))
    assert inspection.inspect(out).tensors  # of the one tensor in NF4 all had been read
    when_called(monkeypatch, inspection, "load_unchanged", lambda: write(tmp_path, 4))
    with pytest.raises(ValueError, match=CHANGED):
        inspection.inspect(out)
    when_called(monkeypatch, verify_module, "check_scales", lambda: write(tmp_path, 5))
    assert any("has changed since it was opened" in problem for problem in verify_module.verify(out).problems)


def test_a_single_file_that_changed_is_refused_though_it_fits(out: Path) -> None:
    tensors = iter_npy_dir(out)
    next(tensors)
    for file in (out / "tensors").glob("*__pt.npy"):
        status = file.stat()
        np.save(file, np.load(file) + 1)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # whoever set its time back
    with pytest.raises(ValueError, match=r"tensor '.*': .*__pt.npy has changed since it was opened"):
        list(tensors)
