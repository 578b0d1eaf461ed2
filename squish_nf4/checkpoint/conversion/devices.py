"""Where a conversion quantizes: the CPU or a GPU, with the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from squish_nf4 import _build_info

CPU = torch.device("cpu")


def device_named(device: str | torch.device) -> torch.device:
    """The device, once it is known that this process can quantize there. ValueError: it cannot."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if found.type == "cuda":
        refuse_without_gpu(found)
    return found


def refuse_without_gpu(device: torch.device) -> None:
    if _build_info.CUDA_VERSION is None:
        raise ValueError(f"device is {device}, but squish_nf4 was built for the CPU only; squish-nf4 doctor says why")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch finds no GPU; squish-nf4 doctor says what it found")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device is {device}, but torch finds {count} GPU{'s' if count > 1 else ''}, numbered from 0")


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device."""
    return values.to(device)


@contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """A GPU without memory stops a conversion as a full disk does, by an OSError: resume goes on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OSError(errno.ENOMEM, f"the memory of {device} is full") from error
