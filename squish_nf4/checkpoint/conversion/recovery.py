"""How a conversion begins: in a new directory, where an earlier run stopped, or in place of a finished one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from squish_nf4.checkpoint.conversion.forms import WRITTEN, open_journal
from squish_nf4.checkpoint.conversion.journal import Journal
from squish_nf4.checkpoint.conversion.output import Output, Record
from squish_nf4.checkpoint.directory.format import JOURNAL, MANIFEST, READY, SIDECAR, STATS, TENSORS, State, state_of
from squish_nf4.checkpoint.directory.tables import read_table
from squish_nf4.checkpoint.files import inside, place_file, sha256_of, sync
from squish_nf4.checkpoint.messages import brief, listed, shown, visible
from squish_nf4.replace import refuse_to_replace, remove

PART = re.compile(r"\.squish_nf4-[0-9a-f]{8}-\d+\.part")


def refuse_unless_free(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises FileExistsError if path holds something that this conversion may neither go on with nor replace."""
    state = state_of(path)
    if state is State.FOREIGN:
        raise FileExistsError(f"{path} is not empty; convert into a new or an empty directory")
    if state is State.FINISHED and not overwrite:
        raise FileExistsError(f"{path} is a finished squish directory; overwrite replaces it")
    if state is State.UNFINISHED and not (resume or overwrite):
        raise FileExistsError(
            f"{path} holds an unfinished conversion; resume goes on with it, and overwrite starts anew"
        )


def bytes_freed(path: Path, overwrite: bool) -> int:
    """Bytes of the files that go before the first is written: part files that were left, and what is replaced."""
    state = state_of(path)
    with ExitStack() as locked:
        old, files = None, []
        if overwrite and state is State.UNFINISHED:
            old = locked.enter_context(closing(open_journal(path / JOURNAL)))
        if overwrite and state is not State.NEW:
            files = [path / name for name in written_before(path, old, unchanged=has_its_size)]
    if (path / TENSORS).is_dir():
        files += [file for file in (path / TENSORS).iterdir() if PART.fullmatch(file.name)]
    return sum(file.lstat().st_size for file in files if file.is_file())


def begin(path: Path, header: Record, *, overwrite: bool) -> Journal:
    """The journal of an output in a new or empty directory, or in place of an earlier one, which recover then clears.

    Raises:
        BlockingIOError: another conversion is writing there.
        FileExistsError: one has been, since we looked.
        ValueError: what that was cannot be told, or shards it was made of are there no more.
        OSError: a file of ours has the name of something else, a pipe say, which is not replaced.
    """
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locked:

        def whole_header() -> Record:
            refuse_unless_free(path, resume=False, overwrite=overwrite)
            state, old = state_of(path), None
            if state is State.UNFINISHED:
                old = locked.enter_context(closing(open_journal(path / JOURNAL)))
                refuse_only_copy(path, old, header)
            if state is State.NEW:
                return {**header, "replaces": None}
            names = list(written_before(path, old, unchanged=is_as_written))
            files_to_clear(path, names)
            return {**header, "replaces": names}

        return Journal.create(path / JOURNAL, whole_header)


def refuse_only_copy(path: Path, journal: Journal, header: Record) -> None:
    """An unfinished conversion whose shards were removed, unless the source of the header has them again."""
    for shard in removed_by(journal):
        if header["shards"].get(shard, {}).get("header_sha256") != journal.header["shards"][shard]["header_sha256"]:
            raise ValueError(
                f"{path} is the only copy of what its source held in {brief(shard)}, which was removed as it was "
                "converted; convert it as it was begun, with resume, or bring the shard back"
            )


def removed_by(journal: Journal) -> list[str]:
    return [fact["removed"] for fact in journal.facts if "removed" in fact]


def refuse_another(path: Path, journal: Journal, header: Record) -> None:
    """Raises ValueError if the source or an option is not what it was in the earlier run that resume goes on with."""
    compared = {"journal", "writer", "options", "shards"}  # "tensors" and "tied" follow from these
    if not removed_by(journal):  # else there is no way back, and what was removed matters more than a changed text
        compared.add("small_files")
    refuse_changes(path, journal.header, {what: facts for what, facts in header.items() if what in compared})


def note_other_files(path: Path, journal: Journal, header: Record, *, delete_source: bool) -> None:
    """Journals which shards are not known to be the files that earlier runs read: copies, or another checkpoint's.

    Raises:
        ValueError: there are some, and delete_source would remove them.
    """
    before = dict(journal.header.get("identities", {}))
    for fact in journal.facts:
        for shard in fact.get("copies", ()):
            before.pop(shard, None)
    others = [shard for shard, identity in header["identities"].items() if before.get(shard) != identity]
    if others and delete_source:
        raise ValueError(
            f"delete_source: it is not known that {path} was begun with these very files: {listed(others)} (copied, "
            "touched or replaced since); go on without delete_source, and verify the output with its source before you "
            "remove that"
        )
    if others:
        journal.append([{"copies": others}])


def refuse_changes(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares two headers and says what differs first."""
    for what in now:
        old, new = before.get(what), json.loads(json.dumps(now[what]))  # as it would come back from a file
        if old == new:
            continue
        if isinstance(old, dict):
            absent = object()
            what = next(name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent))
            old, new = old.get(what), new.get(what)
        found = visible(f": it was {old}, and is {new}") if len(f"{old}{new}") < 200 else ""
        raise ValueError(
            f"{path} was begun with another {brief(what)}{found}; convert it as it was begun, or, if its source is "
            "still whole, overwrite it"
        )


def recover(output: Output) -> None:
    """Clears what is replaced, settles what the journal holds, and removes the part files of what it does not.

    Raises:
        ValueError: a finished file is not as it was written, or lies outside.
    """
    path, journal = output.path, output.journal
    sync(path)  # a new journal has its name
    if journal.header.get("replaces") is not None and not any("cleared" in fact for fact in journal.facts):
        clear(path, journal.header["replaces"])
        journal.append([{"cleared": True}])
    if not os.path.lexists(output.folder):
        output.folder.mkdir()
    refuse_other_folder(output.folder)
    for fact in journal.facts:
        if "tensor" in fact and settle(path, TENSORS, fact, fact["record"]["files"]):
            output.records[fact["tensor"]] = fact["record"]
        elif "copied" in fact and settle(path, "", fact, {fact["copied"]: fact["record"]}):
            output.copied[fact["copied"]] = fact["record"]
    for file in output.folder.iterdir():
        if PART.fullmatch(file.name) and file.is_file():
            file.unlink()


def refuse_other_folder(folder: Path) -> None:
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise ValueError(f"{folder} is no folder of this conversion; move it away")


def settle(path: Path, folder: str, fact: Mapping[str, Any], files: Mapping[str, Record]) -> bool:
    """Gives files their names if the end came before that. False: some are gone, and now all of them are.

    Raises:
        ValueError: one of them is not as it was written, or lies outside path.
    """
    places = {inside(path, folder, name): inside(path, TENSORS, part) for name, part in fact["parts"].items()}
    if not all(final.exists() or part.exists() for final, part in places.items()):
        for file in (*places, *places.values()):
            remove(file)
        return False
    for (final, part), record in zip(places.items(), files.values(), strict=True):
        if part.exists():
            place_file(part, final)
        if not is_as_written(final, record):
            raise ValueError(f"{shown(final)} was changed since it was written; move it away, and it is written again")
    return True


def has_its_size(file: Path, record: Record) -> bool:
    return not file.is_symlink() and file.is_file() and file.stat().st_size == int(record["bytes"])


def is_as_written(file: Path, record: Record) -> bool:
    if not has_its_size(file, record):
        return False
    with file.open("rb") as reader:
        return sha256_of(reader) == str(record["sha256"])


def clear(path: Path, names: list[str]) -> None:
    """Removes an earlier conversion; what makes a reader trust it goes first. ValueError: a name leads outside path."""
    files = files_to_clear(path, names)
    ready = path / TENSORS / READY
    ready.unlink(missing_ok=True)
    if ready.parent.is_dir():
        sync(ready.parent)
    for file in files:
        file.unlink(missing_ok=True)


def files_to_clear(path: Path, names: list[str]) -> list[Path]:
    """The files of an earlier conversion. ValueError, OSError: one of them, or their folder, is something else."""
    files = [inside(path, "", name) for name in (*names, MANIFEST, STATS, SIDECAR)]
    refuse_other_folder(path / TENSORS)
    for file in (path / TENSORS / READY, *files):
        refuse_to_replace(file)
    return files


def written_before(path: Path, journal: Journal | None, *, unchanged: Callable[[Path, Record], bool]) -> Iterator[str]:
    """The files, relative to path, that an earlier conversion wrote; of the small ones, those that are as they were.

    journal: of that conversion, if it is unfinished. unchanged: whether a file is as it was, by its record.

    Raises:
        ValueError: path has no squish_nf4.json, or one that is damaged; or a tensor's file was changed.
    """
    if journal is not None:
        for name in journal.header.get("replaces") or ():
            inside(path, "", name)
            yield name
        tensors = [fact["record"] for fact in journal.facts if "tensor" in fact]
        copied = {fact["copied"]: fact["record"] for fact in journal.facts if "copied" in fact}
    else:
        tensors, copied = read_written(path)
    for record in tensors:
        for name, facts in record["files"].items():
            if os.path.lexists(file := inside(path, TENSORS, name)):
                if not unchanged(file, facts):
                    raise ValueError(
                        f"{shown(file)} was changed since it was written, and is not overwritten; move it away"
                    )
                yield f"{TENSORS}/{name}"
    for name, facts in copied.items():
        if unchanged(inside(path, "", name), facts):
            yield name


def read_written(path: Path) -> tuple[list[Record], dict[str, Record]]:
    """The records of the tensors and of the small files that squish_nf4.json says were written."""
    try:
        sidecar = read_table(path / SIDECAR)
        if not WRITTEN(sidecar):
            raise ValueError("it is damaged")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be overwritten: its {SIDECAR} does not say which files are this tool's ({error}); move the "
            "directory away"
        ) from error
    return list(sidecar["tensors"].values()), sidecar["copied"]
