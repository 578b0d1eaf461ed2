"""What export_torchscript cannot write and where it cannot write, its error, and torch's errors in one line each."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from squish_nf4.replace import refuse_to_replace

REASON_COMES_LAST = ("The following operation failed", "Tracer cannot infer type")


class TorchScriptError(RuntimeError):
    """TorchScript cannot take the model, or what it made of it does not compute what the model computes."""


def refuse_target(path: Path, overwrite: bool) -> None:
    """Raise an OSError that says why, if a file cannot be written at ``path``, or is there and may not be replaced."""
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"export_torchscript: the directory {folder} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"export_torchscript: {path} is a directory; name a file in it")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"export_torchscript: {path} exists; overwrite=True replaces it")
    try:
        refuse_to_replace(path)
    except FileExistsError as error:
        raise FileExistsError(f"export_torchscript: {error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"export_torchscript: cannot write into the directory {folder}")


def refuse_unready(model: nn.Module) -> None:
    """Raise TypeError or ValueError if the model cannot be exported as it is; the text says what to do first."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_torchscript: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("export_torchscript: the model is TorchScript already; torch.jit.save writes it")
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise ValueError(
            "export_torchscript: autocast is on, which a TorchScript file does not know; export outside of it"
        )
    for name, module in model.named_modules():
        which = f"{name} of the model" if name else "the model"
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):  # what torch.compile returns
            raise TypeError(f"export_torchscript: {which} is compiled; use the one that was given to torch.compile")
        if module.training:
            raise ValueError(
                f"export_torchscript: {which} is in training mode, which would be written into the file; "
                "call model.eval() first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"export_torchscript: {name} is of a lazy module and has no values; call the model once")
        if tensor.is_meta:
            raise ValueError(f"export_torchscript: {name} is on the meta device and has no values; load them first")
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"export_torchscript: {name} is a {type(tensor).__name__}; TorchScript saves plain tensors"
            )


def in_one_line(error: Exception) -> str:
    """What torch says of a model, and the line of the model that it is about."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))
    lines = [line.strip(" :.") for line in text.splitlines() if line.strip(" :.")] or [type(error).__name__]
    said = lines[-1 if lines[0].startswith(REASON_COMES_LAST) else 0][:300]
    places = [(file, line) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text) if Path(file).is_file()]
    place = f"{Path(places[-1][0]).name}:{places[-1][1]}" if places else place_of(error)
    return f"{said} ({place})" if place else said


def place_of(error: Exception) -> str | None:
    """The innermost line that is neither torch's nor of the export: what a user may want to look at."""
    own = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None
