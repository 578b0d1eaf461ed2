"""What the pages and the sources point to is there: links with their anchors, paths, modules to run, pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = ("benchmarks", "csrc", "docs", "examples", "scripts", "squish_nf4", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".c", ".sh", ".cmake") and "corpus" not in path.parts
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
MODULE = re.compile(r"python -m ((?:benchmarks|tests|squish_nf4)[\w.]*)")


def by_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    """Without the code in fences, whose brackets are no links."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", text_of(page))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(text_of(page)):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths from the repository root, and those of headers that are included from the package. NAME stands for any."""
    roots = (ROOT, ROOT / "squish_nf4" / "include")
    paths = [path for path in PATH.findall(LINK.sub("", text)) if "NAME" not in path]
    missing = [path for path in paths if not any((root / path).exists() for root in roots)]
    modules = [ROOT / name.replace(".", "/") for name in MODULE.findall(text)]
    return missing + [str(path) for path in modules if not (path.is_dir() or path.with_suffix(".py").is_file())]


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_a_page_links_and_names_what_is_there(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_paths(page.read_text()) == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page not in linked} == {index}


def test_the_sources_name_pages_that_are_there() -> None:
    named = {(by_path(path), page) for path in SOURCES for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())}
    assert {(path, page) for path, page in named if not (ROOT / page).exists()} == set()


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A *b*\n[a](#a-b) [b](#c) [c](page.md#a-b) [d](other.md) [e](https://x.y)\n```\n[f](g.md)\n```\n")
    assert broken_links(page) == ["#c", "other.md"]
    text = "csrc/nf4/codec.h, csrc/gone.cpp; python -m benchmarks.goals, python -m benchmarks.gone; <squish_nf4/nf4.h>"
    assert missing_paths(text) == ["csrc/gone.cpp", str(ROOT / "benchmarks" / "gone")]
