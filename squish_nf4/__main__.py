"""The command ``squish-nf4``, also ``python -m squish_nf4``. What stops it from starting is said in one sentence."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def main() -> None:
    open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        never_fail_on_a_character(stream)
    try:
        from squish_nf4.commands.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("squish_nf4"):
            raise
        sys.exit(
            f"squish-nf4: the command line needs {error.name}, which is not installed; type: pip install typer rich"
        )
    try:
        app(prog_name="squish-nf4")
    except OSError as error:  # --help and --version on a full disk
        sys.exit(f"squish-nf4: {error}")


def open_what_is_closed() -> None:
    """A stream that was closed by who started the command (>&-) leads nowhere. Its number may not go to a file that is
    opened later: what a library prints would be written into that."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def never_fail_on_a_character(stream: TextIO) -> None:
    """A terminal that cannot show a line or a tensor's name gets a question mark in its place."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


if __name__ == "__main__":
    main()
