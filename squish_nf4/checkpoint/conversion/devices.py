"""Where a conversion quantizes: the CPU or a GPU, with the same bytes."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from squish_nf4 import _build_info

CPU = torch.device("cpu")


def device_named(device: str | torch.device) -> torch.device:
    """The device, a GPU with its number, once it is known that this process can quantize there.

    Raises:
        ValueError: it cannot, or device is none.
    """
    match = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", str(device))
    if match is None or not isinstance(device, (str, torch.device)):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if match[1]:
        return CPU
    refuse_without_gpu(device)
    # Of this thread: those that encode have current devices of their own.
    number = torch.cuda.current_device() if match[2] is None else int(match[2])
    if number >= (count := torch.cuda.device_count()):
        raise ValueError(f"device is {device}, but torch finds {count} GPU{'s' if count > 1 else ''}, numbered from 0")
    return torch.device("cuda", number)


def refuse_without_gpu(device: str | torch.device) -> None:
    if _build_info.CUDA_VERSION is None:
        raise ValueError(f"device is {device}, but squish_nf4 was built for the CPU only; squish-nf4 doctor says why")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch finds no GPU; squish-nf4 doctor says what it found")


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device."""
    return values.to(device)


@contextmanager
def failures_of(device: torch.device) -> Iterator[None]:
    """A GPU that fails, or has no memory left, stops a conversion as a full disk does: by an OSError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OSError(errno.ENOMEM, f"the memory of {device} is full") from error
    except torch.AcceleratorError as error:
        first_line = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"{device} fails: {first_line}") from error
