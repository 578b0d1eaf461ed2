"""An exported file, tried in a fresh Python process that never imports squish_nf4; its program is trial_program.py."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from squish_nf4._native import library_path
from squish_nf4.torchscript import trial_program
from squish_nf4.torchscript.calls import Call, map_tensors
from squish_nf4.torchscript.refusals import TorchScriptError
from squish_nf4.torchscript.trial_program import Leaves, saved

# Isolated (-I) and without site (-S), Python knows its standard library alone. That stays first: no file of the user's
# takes the place of a module of it.
START = "import sys, json; sys.path += json.loads(sys.argv.pop(1)); exec(sys.argv.pop(1))"


@dataclass(frozen=True)
class Trial:
    """What a fresh process found in a file.

    Attributes:
        operators: those of squish that the file calls.
        outputs: for each call what it returned, flat, or the text of its error.
    """

    operators: tuple[str, ...]
    outputs: list[Leaves | str]


def search_path() -> list[str]:
    """Where the fresh process finds this process's torch and what that imports, beside the standard library.

    The folder of torch comes first, and after it where this process looks, for what torch imports may be installed
    elsewhere. There a file of the user's may have the name of a module that is not installed, and torch looks for: the
    working directory and the folder of the user's program are left out.
    """
    main = getattr(sys.modules["__main__"], "__file__", None)
    own = {os.getcwd(), *([os.path.dirname(os.path.realpath(main))] if main else [])}
    of_torch = os.path.dirname(os.path.dirname(os.path.realpath(torch.__file__)))
    return [of_torch, *(path for path in map(os.path.realpath, filter(None, sys.path)) if path not in own)]


def try_in_fresh_process(file: Path, calls: Sequence[Call]) -> Trial:
    """Load a TorchScript file where only the op library is loaded, and call it with the settings of this process.

    Calls and results travel in files in the file's directory.

    Raises:
        TorchScriptError: the process failed, or could not load the file.
    """
    settings = {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }
    plain_calls = [map_tensors(call, lambda t: t, named=False) for call in calls]  # as its classes are unknown there
    program = Path(trial_program.__file__).read_text()
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        tasks, results = Path(folder, "tasks"), Path(folder, "results")
        tasks.write_bytes(saved({"calls": plain_calls, **settings}))
        arguments = [json.dumps(search_path()), program, library_path(), str(file), str(tasks), str(results)]
        command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", START, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise TorchScriptError(
                f"export_torchscript: a fresh process with only the op library cannot run the file: {said[-1]}"
            )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Validating sparse tensor")
                found = torch.load(results, weights_only=True)
        except pickle.UnpicklingError as error:
            raise TorchScriptError(
                f"export_torchscript: a result of the exported model cannot be compared: {str(error).splitlines()[0]}"
            ) from None
    return Trial(tuple(found["operators"]), found["outputs"])
