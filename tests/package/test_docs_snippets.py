"""The snippets of README and docs/ run as they stand there, the ones of a page one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import squish_nf4
from tests.support import ROOT


def snippets(page: str) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / page).read_text())


def run(page: str, code: list[str], **names: object) -> dict[str, object]:
    for snippet in code:
        exec(compile(snippet, page, "exec"), names)
    return names


def test_the_first_example_of_the_readme_runs() -> None:
    names = run("README.md", snippets("README.md")[:1])
    assert len(names["report"].layers) == 2  # type: ignore[attr-defined]


def test_a_model_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippets("docs/saving.md")
    assert len(code) == 3
    run("docs/saving.md", code)


@pytest.mark.compiles
@pytest.mark.usefixtures("inductor")
def test_a_model_is_compiled_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippets("docs/compile-and-export.md")
    assert len(code) == 7
    run("docs/compile-and-export.md", code)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.pt2", "model-aoti.pt2", "model.onnx"}


def test_the_page_of_the_format_is_enough_to_read_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy, the table of levels and the last snippet: what load_npy_dir gives."""
    page = (ROOT / "docs" / "format.md").read_text()
    rows = re.findall(r"(?m)^\| (\d+) \| (-?[\d.]+) \| (\d+) \| (-?[\d.]+) \|$", page)
    levels = {int(index): float(level) for row in rows for index, level in (row[:2], row[2:])}
    assert sorted(levels) == list(range(16))
    save_file({"up.weight": torch.randn(6, 10, 96)}, tmp_path / "model.safetensors")
    squish_nf4.convert(tmp_path / "model.safetensors", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    table = np.array([levels[index] for index in range(16)], np.float32)
    names = run("docs/format.md", snippets("docs/format.md")[-1:], np=np, LEVELS=table, key="up__weight")
    np.testing.assert_array_equal(names["w"], squish_nf4.load_npy_dir(".")["up.weight"].numpy())
