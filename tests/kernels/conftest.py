from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.compiling import compile_objects, kernel_sources
from tests.support.once import shared_folder


@pytest.fixture(scope="session")
def kernel_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """csrc/cpu as setup.py compiles it, by the names of the sources; a test that asks for it says ``builds``."""
    with shared_folder(tmp_path_factory, "objects") as folder:
        expected = {source.stem: folder / f"{source.stem}.o" for source in kernel_sources()}
        if not (folder / "whole").exists():
            compile_objects(folder, kernel_sources(), ["-O3", "-fvisibility=hidden"])
            (folder / "whole").touch()
        return expected
