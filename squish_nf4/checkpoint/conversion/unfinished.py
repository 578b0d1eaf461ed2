"""How a conversion ends that has begun to write and cannot go on: by saying what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from squish_nf4.checkpoint.conversion.output import Output


class UnfinishedError(OSError):
    """The system, the disk above all, stopped a conversion that resume goes on with."""


@contextmanager
def saying_what_is_left(output: Output, tensors: int) -> Iterator[None]:
    """What stops the writing says, beside its cause, what it leaves behind."""

    def left() -> str:
        return (
            f"{output.path} is left unfinished, with {len(output.records)} of {tensors} tensors: no reader takes it "
            "for a checkpoint"
        )

    goes_on = "resume goes on with it"
    starts_anew = "when the source or the options are mended, overwrite starts anew"

    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted. {left()}; {goes_on}") from error
    except OSError as error:
        facts = () if error.errno is None else (error.errno, f"{error.strerror}. {left()}; {goes_on}", error.filename)
        raise UnfinishedError(*facts or (f"{error}. {left()}; {goes_on}",)) from error
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError  # not a subclass: some take other arguments
        raise kind(f"{error}. {left()}; {starts_anew}") from error
