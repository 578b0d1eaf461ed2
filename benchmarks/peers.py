"""The libraries we compare with, where they are installed."""

from __future__ import annotations

from types import ModuleType


def bitsandbytes_functional() -> ModuleType | None:
    """bitsandbytes.functional, or None, said once."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        print("bitsandbytes is not installed: left out (pip install bitsandbytes)")
        return None
    return functional
