"""A TorchScript file written so that a full disk is an error. Where torch writes to a disk, that ends the process.

torch's writer, destroyed after an error, writes once more and throws. So it writes into memory, and Python to the disk.
That takes the bytes of the file once, as much as the fresh process takes that tries the file after that.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch


def save(module: Any, file: Path) -> None:
    """Write a scripted or traced module to a file. OSError: the disk does not take it; a part of it may be left."""
    with file.open("wb") as target:
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            torch.jit.save(module, target)  # in memory three times; the limit holds for files in memory too
            return
        with tempfile.TemporaryDirectory() as folder, os.fdopen(os.memfd_create(file.name[:50]), "rb") as memory:
            link = Path(folder, file.name)  # torch writes the name into the file
            link.symlink_to(f"/proc/self/fd/{memory.fileno()}")
            torch.jit.save(module, link)
            shutil.copyfileobj(memory, target, 2**20)
