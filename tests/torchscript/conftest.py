from __future__ import annotations

import pytest

from squish_nf4.torchscript import export
from tests.support.scripts import run_here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """export_torchscript tries its files in this process: for tests of what it does with the results."""
    monkeypatch.setattr(export, "try_in_fresh_process", run_here)
