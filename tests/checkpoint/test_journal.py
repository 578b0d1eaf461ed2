"""The journal file itself; what a conversion makes of one: test_convert_resume.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from squish_nf4.checkpoint.conversion import journal as module
from squish_nf4.checkpoint.conversion.journal import Journal
from tests.support.directories import make_a_socket


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def reopened(path: Path) -> Journal:
    journal = Journal(path)
    journal.close()
    return journal


def test_what_is_appended_is_there_when_it_is_opened_again(path: Path) -> None:
    journal = Journal.create(path, lambda: {"a": 1})
    journal.append([{"b": "ü\n"}, {"c": 0.1}])
    journal.append([{"d": None}])
    journal.close()
    assert (reopened(path).header, reopened(path).facts) == ({"a": 1}, [{"b": "ü\n"}, {"c": 0.1}, {"d": None}])
    assert len(path.read_bytes().splitlines()) == 4


def test_a_line_cut_short_is_cut_off_before_the_next(path: Path) -> None:
    Journal.create(path, lambda: {"a": 1}).close()
    for cut in (b'{"b"', b'{"b": 2}', b"\xff"):
        with path.open("ab") as file:
            file.write(cut)
        journal = Journal(path)
        assert journal.facts == []
        journal.append([{"c": 3}])
        journal.close()
        assert reopened(path).facts == [{"c": 3}]
        Journal.create(path, lambda: {"a": 1}).close()


def test_what_the_disk_did_not_take_as_a_whole_it_does_not_keep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(path, lambda: {"a": 1})
    journal.append([{"b": 2}])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append([{"lost": 0}])
    journal.append([{"c": 3}])
    journal.close()
    assert reopened(path).facts == [{"b": 2}, {"c": 3}]


def test_a_new_one_takes_the_place_of_an_old_one_only_when_its_header_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.create(path, lambda: {"old": 1}).close()

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            Journal.create(path, lambda: {"new": 1})
    assert reopened(path).header == {"old": 1}
    Journal.create(path, lambda: {"new": 1}).close()
    assert reopened(path).header == {"new": 1}


def test_what_is_called_like_it_and_is_no_file_is_said_to_be_none(path: Path) -> None:
    make_a_socket(path)
    with pytest.raises(FileExistsError, match=r"journal is a link .*, or is no file; move it away"):
        Journal(path)


def test_what_was_appended_last_can_be_taken_back(path: Path) -> None:
    journal = Journal.create(path, lambda: {"a": 1})
    journal.append([{"b": 2}])
    journal.append([{"not so": 0}, {"nor so": 0}])
    journal.take_back()
    journal.append([{"c": 3}])
    journal.close()
    assert reopened(path).facts == [{"b": 2}, {"c": 3}]


def test_it_is_locked_while_it_is_open(path: Path) -> None:
    journal = Journal.create(path, lambda: {})
    with pytest.raises(BlockingIOError, match="is being written by another conversion"):
        Journal(path)
    journal.close()
    reopened(path)


def test_it_is_removed_when_all_is_done(path: Path) -> None:
    Journal.create(path, lambda: {}).remove()
    assert not path.exists()


def test_only_one_begins_it(path: Path) -> None:
    def header() -> dict[str, int]:
        with pytest.raises(BlockingIOError, match="is being written by another conversion"):
            Journal.create(path, lambda: {"second": 1})
        return {"first": 1}

    Journal.create(path, header).close()
    assert reopened(path).header == {"first": 1}


def test_a_header_that_is_refused_leaves_the_old_one(path: Path) -> None:
    def refuse() -> dict[str, int]:
        raise FileExistsError

    Journal.create(path, lambda: {"old": 1}).close()
    with pytest.raises(FileExistsError):
        Journal.create(path, refuse)
    assert reopened(path).header == {"old": 1}
    assert list(path.parent.iterdir()) == [path]
