"""How a file takes the place of an earlier one: whole or not at all, and never the place of anything else."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HIDDEN = ".squish_nf4."  # how the new folder's name begins

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def refuse_to_replace(path: Path) -> None:
    """Raise an OSError if there is something at ``path`` that is neither a regular file nor a link to one.

    A link to nothing may be written through.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        error = IsADirectoryError if stat.S_ISDIR(mode) else FileExistsError
        raise error(f"{path} is {kind}; only a regular file is replaced")


def remove(path: Path) -> None:
    """Remove a file or a link, if there is one. OSError: there is something else, which stays."""
    refuse_to_replace(path)
    path.unlink(missing_ok=True)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file to write in a new folder beside ``path``, which takes its place at the end; a symbolic link is followed.

    After an error nothing is left, and what was there before stays. Of a file that was there, its mode stays.

    Raises:
        FileExistsError, IsADirectoryError: what is there is no regular file.
        OSError: it cannot be written; the error names path, and not the file in the new folder.
    """
    refuse_to_replace(path)
    target = Path(os.path.realpath(path))
    hidden = os.path.join(target.parent, HIDDEN)
    try:
        with tempfile.TemporaryDirectory(prefix=HIDDEN, dir=target.parent) as folder:
            file = Path(folder, target.name)
            yield file
            with file.open("rb") as written:
                os.fsync(written.fileno())  # else a crash soon after may leave an empty file in place of the earlier
            refuse_to_replace(target)
            with suppress(FileNotFoundError):
                file.chmod(stat.S_IMODE(target.stat().st_mode))
            file.replace(target)
    except OSError as error:
        if error.errno is None or not str(error.filename or hidden).startswith(hidden):
            raise
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
