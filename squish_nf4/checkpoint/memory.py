"""How much memory there is, asked before much of it is taken."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


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
