"""What export_torchscript refuses before any work: where it cannot write, and what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def refuse_target(path: Path, overwrite: bool) -> None:
    """Before any work."""
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"export_torchscript: the directory {folder} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"export_torchscript: {path} is a directory; name a file in it")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"export_torchscript: {path} exists; overwrite=True replaces it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"export_torchscript: cannot write into the directory {folder}")


def refuse_unready(model: nn.Module) -> None:
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
