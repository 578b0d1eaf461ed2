"""Disk and memory: asked for before much of either is taken."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

GB = 10**9
DEFAULT_MIN_FREE_GB = 1.0
MEMINFO = Path("/proc/meminfo")


def require_room(path: Path, needed: int, min_free_gb: float) -> None:
    """Raises OSError (ENOSPC) unless so many bytes fit on the disk of path and min_free_gb stay free.

    ValueError: min_free_gb is negative or NaN.
    """
    if not min_free_gb >= 0:
        raise ValueError(f"min_free_gb must be 0 or more, got {min_free_gb}")
    free = shutil.disk_usage(nearest_folder(path)).free
    if free < needed + min_free_gb * GB:
        raise OSError(
            errno.ENOSPC,
            f"{path} is on a disk with {free / GB:.2f} GB free; the conversion still takes {needed / GB:.2f} GB, and "
            f"{min_free_gb:g} GB are to stay free (min_free_gb)",
        )


def nearest_folder(path: Path) -> Path:
    """path, or what is there of the way to it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def peak(steps: Sequence[tuple[int, int]]) -> int:
    """The most that is taken at once if step by step something is (written, then removed), in bytes."""
    taken = highest = 0
    for written, removed in steps:
        highest = max(highest, taken := taken + written)
        taken -= removed
    return highest


def available_memory() -> int | None:
    """Bytes that can be taken without pushing others out, free swap included; None where the system does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kilobytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    try:
        return 1024 * (int(kilobytes["MemAvailable"]) + int(kilobytes["SwapFree"]))
    except (KeyError, ValueError):
        return None


def require_memory(n_bytes: int, what: str) -> None:
    """ValueError: what would take n_bytes, and there are fewer."""
    available = available_memory()
    if available is not None and n_bytes > available:
        raise ValueError(f"{what} takes {n_bytes / 1e9:,.1f} GB of memory; {available / 1e9:,.1f} GB are free")
