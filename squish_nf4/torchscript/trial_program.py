"""The program of the fresh process in which an exported file is tried: torch and the op library, nothing of squish_nf4.

trial.py reads this file as text and has a fresh Python execute it, so it imports nothing of the package. A C++ program
does the same four things: it loads the op library, loads the file, calls it, and looks at the results.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Leaves = list[tuple[str, Any]]  # what a nested result holds: place and value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of nested tuples, lists and mappings, each with its place: ("['logits'][0]", t).

    The exporting process flattens eager's results with it, and this program the file's: results are compared place by
    place, so both sides have to name the places alike. It stands here because this program cannot import it.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def copy_of(value: Any) -> Any:
    """A copy of one result on the CPU: it may be the model's own tensor, which the next call writes to."""
    return value.detach().cpu().resolve_conj().resolve_neg().clone() if isinstance(value, Tensor) else value


def results(value: Any) -> Leaves:
    """Copies of what a call returned, flat."""
    return [(place, copy_of(leaf)) for place, leaf in leaves(value)]


def call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaves | str:
    """What a call of the module returns, flat, or the last line of its error."""
    try:
        return results(module(*args, **kwargs))
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[-1]


def operators(file: str) -> list[str]:
    """The operators of squish that a TorchScript file calls in any of its methods, sorted.

    Read from its code: torch.jit.export_opnames fails on with-blocks.
    """
    with zipfile.ZipFile(file) as archive:
        code = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")]
    return sorted({f"squish::{name}" for text in code for name in re.findall(r"\bops\.squish\.(\w+)", text)})


def saved(value: Any) -> memoryview:
    """What torch.save writes. Where it writes into a file itself, a full disk ends the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def main(library: str, file: str, tasks: str, outcome: str) -> None:
    task = torch.load(tasks, weights_only=True)
    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision(task["precision"])
    torch.set_grad_enabled(task["grad"])
    torch.set_default_dtype(task["dtype"])
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    outputs = [call(module, args, kwargs) for args, kwargs in task["calls"]]
    if "squish_nf4" in sys.modules:
        sys.exit("squish_nf4 was imported, though the op library has to be enough")
    Path(outcome).write_bytes(saved({"operators": operators(file), "outputs": outputs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
