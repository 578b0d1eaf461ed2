"""How a command ends that cannot do what it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from squish_nf4.commands import terminal
from squish_nf4.torchscript.refusals import TorchScriptError


@contextmanager
def errors_in_one_sentence(exit_code: int = 1) -> Iterator[None]:
    """Whatever the user can do something about ends the command with a sentence on stderr and this exit code."""
    try:
        yield
    except ModuleNotFoundError as error:
        terminal.complain(
            f"this needs the package {error.name}, which is not installed; type: pip install {error.name}"
        )
    except (ImportError, OSError, ValueError, TypeError, TorchScriptError) as error:
        terminal.complain(str(error))
    except KeyboardInterrupt:
        terminal.complain("stopped")
    else:
        return
    raise typer.Exit(exit_code)
