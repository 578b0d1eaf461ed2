"""Links in an output, under the names that a conversion writes: nothing is written through them, and none is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.messages import Progress
from tests.support.directories import StoppedError, gaussian, is_finished, save_shard

JOURNAL = "squish_nf4.journal"
DRAFT = f"{JOURNAL}.part"
Make = Callable[[Path, Path], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_shard(tmp_path / "source" / "1.safetensors", {"a": gaussian(8, 64), "b": gaussian(8, 32)})
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "more").mkdir()
    (tmp_path / "source" / "more" / "vocab.txt").write_text("a\n")
    return tmp_path / "source"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text("theirs")
    os.utime(tmp_path / "victim", (1, 1))
    return tmp_path / "victim"


def symbolic(link: Path, victim: Path) -> None:
    link.symlink_to(victim)


def hard(link: Path, victim: Path) -> None:
    link.hardlink_to(victim)


def is_untouched(victim: Path) -> bool:
    return victim.read_text() == "theirs" and victim.stat().st_mtime == 1


def unfinished(source: Path, out: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.tensor == "b":
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, out, progress=stop)
    assert (out / JOURNAL).exists()


@pytest.mark.parametrize("make", [symbolic, hard])
@pytest.mark.parametrize("name", [DRAFT, JOURNAL])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["anew", "resume", "overwrite"])
def test_a_link_called_like_the_journal_is_refused(
    source: Path, tmp_path: Path, victim: Path, make: Make, name: str, options: dict[str, bool]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out / name, victim)
    text = "is a link to a file or another name of one" if options or name == DRAFT else "holds an unfinished"
    with pytest.raises(FileExistsError, match=rf"{name if options or name == DRAFT else 'out'} {text}"):
        convert(source, out, **options)
    assert is_untouched(victim)
    assert os.path.lexists(out / name)


def test_a_link_to_nothing_called_like_the_draft_makes_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / DRAFT).symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError, match=rf"{DRAFT} is a link"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("make", [symbolic, hard])
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "stats.json",
        "squish_nf4.json",
        "config.json",
        "more/vocab.txt",
        "tensors/b__nf4.npy",
        "tensors/.manifest_ready",
    ],
)
def test_nothing_is_written_through_a_link(
    source: Path, tmp_path: Path, victim: Path, make: Make, options: dict[str, bool], name: str
) -> None:
    """Whether the conversion ends well or not: a table takes the place of a link, other files refuse to."""
    out = tmp_path / "out"
    unfinished(source, out)
    (out / name).parent.mkdir(exist_ok=True)
    make(out / name, victim)
    try:
        convert(source, out, **options)
    except OSError as error:
        assert "is there already, and this conversion did not write it" in str(error)  # noqa: PT017 (either end is right)
        assert (out / name).exists()
    else:
        assert is_finished(out)
    assert is_untouched(victim)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_a_link_to_nothing_called_like_the_last_file_makes_nothing(
    source: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    out = tmp_path / "out"
    unfinished(source, out)
    (out / "tensors" / ".manifest_ready").symlink_to(tmp_path / "victim")
    if "overwrite" not in options:
        with pytest.raises(OSError, match=r".manifest_ready is there already, and this conversion did not write it"):
            convert(source, out, **options)
    else:
        convert(source, out, **options)
    assert not (tmp_path / "victim").exists()


def test_tensors_are_not_written_into_a_folder_elsewhere(source: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    unfinished(source, out)
    (out / "tensors").rename(elsewhere)
    (out / "tensors").symlink_to(elsewhere, target_is_directory=True)
    before = {file.name for file in elsewhere.iterdir()}
    with pytest.raises(ValueError, match=r"tensors is no folder of this conversion; move it away"):
        convert(source, out, resume=True)
    assert {file.name for file in elsewhere.iterdir()} == before


@pytest.mark.parametrize("taken", ["a link", "a file"])
def test_a_small_file_whose_folder_is_taken_is_noted_and_written_nowhere(
    source: Path, tmp_path: Path, victim: Path, taken: str
) -> None:
    out = tmp_path / "out"
    unfinished(source, out)
    (tmp_path / "elsewhere").mkdir()
    (out / "more").symlink_to(tmp_path / "elsewhere") if taken == "a link" else victim.rename(out / "more")
    report = convert(source, out, resume=True)
    assert "not copied: more/vocab.txt (the output has a file of its own there)" in report.notes
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(out.rglob("*.part"))
