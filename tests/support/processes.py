"""Every child process of the tests: started in one way, in an environment that lacks what is ours.

A child gets the environment of the tests without the variables of squish_nf4 and pytest, and with the repository on
PYTHONPATH; a test gives what it wants besides by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

LAST_RESORT = 1800  # seconds after which a child counts as hanging; no test may depend on how long one takes

# Python runs a sitecustomize.py that it finds on PYTHONPATH before anything else.
HIDE_PACKAGES = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {hidden!r} else find(name, path, target)

PathFinder.find_spec = find_spec  # as if they were not installed
"""


def environment_of_a_child(more: dict[str, str], sitecustomize: tuple[Path, str] | None = None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUISH_", "PYTEST_"))}
    path = [str(ROOT)]
    if sitecustomize is not None:
        folder, code = sitecustomize
        (folder / "sitecustomize.py").write_text(code)
        path.insert(0, str(folder))
    return env | {"PYTHONPATH": os.pathsep.join(path)} | more


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    stdout: int = subprocess.PIPE,
    sitecustomize: tuple[Path, str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The finished process, its output as text.

    sitecustomize: an empty folder, and code to put there that runs before anything else.
    """
    return subprocess.run(
        [str(word) for word in command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment_of_a_child(environment, sitecustomize),
        timeout=LAST_RESORT,
    )


def start(
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    sitecustomize: tuple[Path, str] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """The running process, for a test that talks to it; ``options`` are Popen's."""
    words = [str(word) for word in command]
    return subprocess.Popen(words, cwd=cwd, env=environment_of_a_child(environment or {}, sitecustomize), **options)


def run_python(code: str, *args: Any, check: bool = True, cwd: Path = ROOT) -> str:
    """What ``code`` prints; ``args`` are its sys.argv[1:]. If not ``check``: the last line of stderr instead."""
    done = run([sys.executable, "-c", code, *(str(arg) for arg in args)], cwd=cwd)
    if check and done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}:\n{done.stderr}", pytrace=False)
    if not check:
        assert done.returncode == 1, (done.returncode, done.stderr)  # an exception, not an abort
        return done.stderr.strip().splitlines()[-1]
    return done.stdout


def squish(
    *args: str | Path,
    cwd: Path = ROOT,
    stdout: int = subprocess.PIPE,
    without: tuple[Path, Iterable[str]] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """``python -m squish_nf4 ...``. without: an empty folder for the machinery, and the packages to hide."""
    code = (without[0], HIDE_PACKAGES.format(hidden=sorted(without[1]))) if without else None
    return run([sys.executable, "-m", "squish_nf4", *args], cwd=cwd, stdout=stdout, sitecustomize=code, **environment)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str, status: int = 1) -> None:
    """It failed, and all it said about that is one line that holds all parts."""
    said = done.stderr.strip()
    assert done.returncode == status, (done.returncode, done.stdout, said)
    assert "Traceback" not in said + done.stdout
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said
