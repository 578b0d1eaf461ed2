"""Commands in processes of their own, in an environment that lacks what a test wants it to lack."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Python runs a sitecustomize.py that it finds on PYTHONPATH before anything else.
HIDE_PACKAGES = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {hidden!r} else find(name, path, target)

PathFinder.find_spec = find_spec  # as if they were not installed
"""


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    sitecustomize: tuple[Path, str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The finished process, its output as text, without our own variables unless given.

    sitecustomize: an empty folder, and code to put there that runs before anything else.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUISH_", "PYTEST_"))}
    path = [str(ROOT)]
    if sitecustomize is not None:
        folder, code = sitecustomize
        (folder / "sitecustomize.py").write_text(code)
        path.insert(0, str(folder))
    env["PYTHONPATH"] = os.pathsep.join(path)
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env | environment, timeout=300)


def squish(
    *args: str | Path, cwd: Path = ROOT, without: tuple[Path, Iterable[str]] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m squish_nf4 ...``. without: an empty folder for the machinery, and the packages to hide."""
    code = (without[0], HIDE_PACKAGES.format(hidden=sorted(without[1]))) if without else None
    return run([sys.executable, "-m", "squish_nf4", *args], cwd=cwd, sitecustomize=code, **environment)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str, status: int = 1) -> None:
    """It failed, and all it said about that is one line that holds all parts."""
    said = done.stderr.strip()
    assert done.returncode == status, (done.returncode, done.stdout, said)
    assert "Traceback" not in said + done.stdout
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said
