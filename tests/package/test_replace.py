"""How a file takes the place of an earlier one: whole or not at all, and never the place of anything else."""

from __future__ import annotations

import ast
import errno
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


def test_an_error_names_the_file_that_was_given(tmp_path: Path) -> None:
    absent, file = tmp_path / "absent" / "file", tmp_path / "file"
    with (
        pytest.raises(FileNotFoundError, match=rf"\] {absent} cannot be written: No such file"),
        written_beside(absent),
    ):
        pass
    with pytest.raises(OSError, match=rf"\] {file} cannot be written: No space left"), written_beside(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'another'$"), written_beside(file):
        raise OSError(errno.EIO, "Input/output error", "another")


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    with written_beside(file) as part:
        part.write_text("new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)


def test_what_became_a_pipe_meanwhile_stays_one(tmp_path: Path) -> None:
    refused = pytest.raises(FileExistsError, match="file is a pipe; only a regular file is replaced")
    with refused, written_beside(tmp_path / "file") as part:
        part.touch()
        os.mkfifo(tmp_path / "file")
    assert (tmp_path / "file").is_fifo()


def test_the_disk_has_a_file_before_it_takes_anothers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "file", []
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda opened: seen.append((os.fstat(opened).st_ino, file.read_text())))
    with written_beside(file) as part:
        part.write_text("new")
    assert seen == [(file.stat().st_ino, "old")]


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


# What removes or replaces a file, and where: beside replace.py a conversion, which places what it wrote beside what it
# knows. Whoever adds a line here looks first at what may be in the way.
REPLACES = {
    "replace.py": {"path.unlink", "file.replace"},
    "checkpoint/files.py": {"part.unlink", "part.rename"},
    "checkpoint/directory/format.py": {"probe.unlink"},
    "checkpoint/directory/npy_writer.py": {"self.part.unlink"},
    "checkpoint/directory/tables.py": {"draft.replace"},
    "checkpoint/conversion/journal.py": {"draft.replace", "draft.unlink", "self.path.unlink"},
    "checkpoint/conversion/recovery.py": {"file.unlink", "ready.unlink"},
    "checkpoint/conversion/run.py": {"shard.path.unlink"},
}


def test_no_other_file_of_the_package_removes_or_replaces_one() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "squish_nf4").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and removes_or_replaces(call):
                name = ast.unparse(call.func)
                found.setdefault(str(path.relative_to(ROOT / "squish_nf4")), set()).add(name)
    assert found == REPLACES


def removes_or_replaces(call: ast.Call) -> bool:
    """Of a path; a string's replace takes two arguments, and that of a dataclass names."""
    name = call.func.attr
    if name == "replace":
        return (len(call.args) == 1 and not call.keywords) or ast.unparse(call.func) == "os.replace"
    return (
        name in {"unlink", "rename", "renames", "rmdir", "rmtree", "move", "removedirs"}
        or ast.unparse(call.func) == "os.remove"
    )
