"""How a file takes the place of an earlier one: whole or not at all, and never the place of anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from squish_nf4.checkpoint.directory.tables import write_table
from squish_nf4.replace import refuse_to_replace, written_beside
from tests.support import ROOT


def test_a_file_is_replaced_whole_and_a_link_stays_one(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):
        with written_beside(link) as part:
            part.write_text(text)
            assert not file.exists() or file.read_text() != text
        assert file.read_text() == text
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_beside(file) as part:
        part.write_text("half\udc80", encoding="utf-8")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_takes_no_pipes_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(FileExistsError, match=r"manifest\.json is a pipe; only a regular file is replaced"):
        write_table(tmp_path / "manifest.json", {}, tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "absent", "dangling"):
        refuse_to_replace(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="is a directory; only a regular file is replaced"):
        refuse_to_replace(tmp_path)


def test_no_other_file_of_the_package_replaces_one() -> None:
    """But those of a conversion, which place what they wrote beside what they know."""
    known = {"replace.py", "tables.py", "files.py", "journal.py"}
    calls = (".replace(target)", ".replace(path)", ".replace(file)", ".rename(", "os.replace", "os.rename")
    files = [path for path in (ROOT / "squish_nf4").rglob("*.py") if any(call in path.read_text() for call in calls)]
    assert {path.name for path in files} == known
