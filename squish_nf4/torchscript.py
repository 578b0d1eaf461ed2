"""Writing a model as a TorchScript file that runs without this package, and making sure that it does.

TorchScript is deprecated by torch in favour of torch.export, and still what many C++ programs load. torch's warning
about that is not shown here: docs/torchscript.md explains it once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squish_nf4._native import library_path
from squish_nf4.linear import NF4Linear

# Runs in a process that has torch and the op library and nothing of this package. argv: library, model, data.
_RUN = """
import sys, torch
library, model, data = sys.argv[1:]
torch.ops.load_library(library)
module = torch.jit.load(model)
if data:
    with torch.no_grad():
        result = module(*torch.load(data + ".inputs", weights_only=True))
    torch.save(result, data + ".result")
assert "squish_nf4" not in sys.modules
"""


@dataclass(frozen=True)
class TorchScriptReport:
    """What export_torchscript wrote and how it was checked.

    route: "script" or "trace". not_scripted: why it was traced, if it was. compared: whether the file was run in a fresh
    process and compared with the model. max_difference: largest |file - model| over all results, 0.0 for equal bits.
    """

    path: Path
    route: str
    bytes: int
    nf4_layers: int
    compared: bool
    max_difference: float | None
    not_scripted: str | None

    def __str__(self) -> str:
        layers = f"{self.nf4_layers} NF4 layer{'' if self.nf4_layers == 1 else 's'}"
        lines = [f"{self.path}: {self.route}d, {layers}, {self.bytes / 1e6:.1f} MB"]
        if self.not_scripted:
            lines.append(f"traced, because torch.jit.script does not take it: {self.not_scripted}")
        if self.compared and self.max_difference == 0.0:
            lines.append("run in a fresh process with only the op library loaded: the same bits as the model")
        elif self.compared:
            lines.append(f"run in a fresh process with only the op library loaded: within {self.max_difference:.2g}")
        else:
            lines.append("loaded in a fresh process with only the op library; not run: there are no example_inputs")
        return "\n".join(lines)


def export_torchscript(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *, overwrite: bool = False
) -> TorchScriptReport:
    """Write a model as TorchScript, after it has run in a fresh process where only the op library is loaded.

    The model is scripted; one that torch.jit.script does not take is traced with ``example_inputs``. A trace holds the
    branches that the example took, and no check of the width of x.

    Args:
        model: in eval mode; NF4Linear layers and whatever else TorchScript takes.
        path: the .pt file. It gets this name only when the check has passed.
        example_inputs: a tensor, or a tuple of the arguments of ``model``. Without them the file is only loaded.
        overwrite: whether an existing file may be replaced.

    Returns:
        How it was written and what the comparison gave.

    Raises:
        ValueError: the model is in training mode or on the meta device; neither route takes it; or the file does not
            compute what the model does. Nothing is written then.
        FileExistsError: ``path`` exists and overwrite is False.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"export_torchscript: {path} exists; pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export_torchscript: the folder {path.parent} does not exist")
    if model.training:
        raise ValueError(
            "export_torchscript: the model is in training mode, and the file would keep its dropout; call model.eval()"
        )
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("export_torchscript: the model is on the meta device; load its weights first")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    inputs = None if inputs is None else tuple(inputs)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        script, reason = _scripted_or_traced(model, inputs)
        file = Path(folder) / path.name
        torch.jit.save(script, str(file))  # type: ignore[no-untyped-call]
        difference = _run_in_fresh_process(model, file, inputs)
        report = TorchScriptReport(
            path=path,
            route="trace" if reason else "script",
            bytes=file.stat().st_size,
            nf4_layers=sum(isinstance(module, NF4Linear) for module in model.modules()),
            compared=inputs is not None,
            max_difference=difference,
            not_scripted=reason,
        )
        os.replace(file, path)
    return report


@contextmanager
def without_deprecation() -> Iterator[None]:
    """torch.jit warns on every call that it is deprecated; docs/torchscript.md says what that means."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        yield


def _scripted_or_traced(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[Any, str | None]:
    """The ScriptModule, and if it was traced why it could not be scripted."""
    with without_deprecation():
        if isinstance(model, torch.jit.ScriptModule):
            return model, None
        try:
            return torch.jit.script(model), None
        except Exception as error:  # its frontend raises many kinds, and some of Python's own
            reason = _first_line(error)
        if inputs is None:
            raise ValueError(
                f"export_torchscript: torch.jit.script does not take this {type(model).__name__} ({reason}); "
                "pass example_inputs to trace it, or leave by torch.export (docs/export.md)"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return torch.jit.trace(model, inputs, strict=False, check_trace=False), reason
        except Exception as error:
            raise ValueError(
                f"export_torchscript: TorchScript does not take this {type(model).__name__}; script: {reason}; "
                f"trace: {_first_line(error)}. Leave by torch.export instead (docs/export.md)"
            ) from error


def _first_line(error: Exception) -> str:
    """What an error says first, with the kind where the text alone would puzzle."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text.rstrip(":") if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"


def _run_in_fresh_process(model: nn.Module, file: Path, inputs: tuple[Any, ...] | None) -> float | None:
    """The largest difference between the file and the model; raises ValueError if they do not agree."""
    data = "" if inputs is None else str(file.with_name("data"))
    if inputs is not None:
        torch.save(inputs, f"{data}.inputs")
    # Safe path: a module of that name in the working directory would be imported else.
    command = [sys.executable, "-c", _RUN, library_path(), str(file), data]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ValueError(f"export_torchscript: the file does not run in a fresh process: {said[-1] if said else ''}")
    if inputs is None:
        return None
    expected = list(_tensors(model(*inputs)))
    found = list(_tensors(torch.load(f"{data}.result", weights_only=True)))
    return _compare(expected, found)


def _tensors(result: Any) -> Iterator[Tensor]:
    """All tensors of a result, in the order in which TorchScript returns them."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def _compare(expected: list[Tensor], found: list[Tensor]) -> float:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        raise ValueError(
            f"export_torchscript: the file returns {_shapes(found)}, but the model returns {_shapes(expected)}"
        )
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if torch.equal(a, b):
            continue
        wide_a, wide_b = a.double().cpu(), b.double().cpu()
        difference = float((wide_a - wide_b).abs().max())
        tolerance = 100 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if not difference <= tolerance * max(1.0, float(wide_a.abs().max())):
            raise ValueError(
                f"export_torchscript: the file differs from the model by {difference:.3g} on the example_inputs"
            )
        largest = max(largest, difference)
    return largest


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors) or "no tensor"
