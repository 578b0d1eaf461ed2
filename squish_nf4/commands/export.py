"""What ``squish-nf4 export`` exports: a Hugging Face model's directory, or what a function of the user's returns."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import squish_nf4
from squish_nf4.model import QuantizeReport
from squish_nf4.torchscript import TorchScriptReport


@dataclass(frozen=True)
class ExportReport:
    """quantized: None if the model had NF4 layers already."""

    quantized: QuantizeReport | None
    written: TorchScriptReport


class HiddenStates(nn.Module):
    """(input_ids, attention_mask), both (batch, tokens) int64 -> (batch, tokens, width): a plain tensor of a plain call.

    A transformers model returns an object that TorchScript does not know, and takes arguments by keyword.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def export(
    source: str,
    target: Path,
    *,
    group_size: int = 64,
    skip: Sequence[str] = (),
    only: Sequence[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Load, quantize and write a model.

    Args:
        source: a directory that transformers' AutoModel reads, or "package.module:function", where the function returns
            a model or (model, example_inputs).

    Raises:
        ValueError: ``source`` is neither, or TorchScript does not take the model.
    """
    if target.exists() and not overwrite:  # before the work, too
        raise FileExistsError(f"{target} exists; give --overwrite to replace it")
    model, inputs = _from_directory(Path(source)) if Path(source).is_dir() else _from_function(source)
    quantized = None
    if not any(isinstance(module, squish_nf4.NF4Linear) for module in model.modules()):
        quantized = squish_nf4.quantize_model(model, group_size=group_size, skip=skip, only=only)
    model.eval()
    return ExportReport(quantized, squish_nf4.export_torchscript(model, target, inputs, overwrite=overwrite))


def _from_directory(folder: Path) -> tuple[nn.Module, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; a directory of a Hugging Face model is wanted")
    from transformers import AutoModel  # after the look: it takes seconds
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # "eager": attention in plain operations. The others choose a kernel by looking at values, which a trace would keep.
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no attention_mask; write a function that returns (model, example_inputs) "
            "and give it as package.module:function"
        )
    ids = torch.arange(2 * 7).reshape(2, 7) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # padding, or a trace would leave the mask out
    return HiddenStates(model), (ids, mask)


def _from_function(source: str) -> tuple[nn.Module, Any]:
    module, colon, name = source.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"'{source}' is neither a directory nor package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m would
    make: Callable[[], Any] | None = getattr(import_module(module), name, None)
    if not callable(make):
        raise ValueError(f"the module {module} has no function '{name}'")
    made = make()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source} must return a model or (model, example_inputs), got {type(model).__name__}")
    return model, inputs
