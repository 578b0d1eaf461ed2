"""docs/compile-and-export.md: its snippets run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("inductor")
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = SNIPPET.findall((ROOT / "docs" / "compile-and-export.md").read_text())
    assert len(snippets) == 7
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/compile-and-export.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.pt2", "model-aoti.pt2", "model.onnx"}
