"""Python code in a process of its own: nothing imported, no operators loaded, no environment variable of ours set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *args: Any, check: bool = True, cwd: Path = ROOT) -> str:
    """What ``code`` prints; ``args`` are its sys.argv[1:]. If not ``check``: the last line of stderr instead.

    The package can be imported, for the default working directory is the repository's root.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUISH_")}
    command = [sys.executable, "-c", code, *(str(arg) for arg in args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)
    if check and done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}:\n{done.stderr}", pytrace=False)
    if not check:
        assert done.returncode == 1, (done.returncode, done.stderr)  # an exception, not an abort
        return done.stderr.strip().splitlines()[-1]
    return done.stdout
