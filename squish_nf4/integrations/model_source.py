"""A model by name: out of a Hugging Face directory or a function, with example inputs; and exported as TorchScript."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squish_nf4.integrations.offline import offline_and_quiet
from squish_nf4.model.quantize import quantize_model
from squish_nf4.model.report import QuantizeReport
from squish_nf4.nn.linear import NF4Linear
from squish_nf4.torchscript.export import TorchScriptReport, export_torchscript
from squish_nf4.torchscript.refusals import TorchScriptError, place_of, refuse_target

Step = Callable[[str], AbstractContextManager[None]]
FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class ExportReport:
    """What export_source did.

    Attributes:
        source: the name of the model.
        quantized: what became NF4; None if the model came with NF4 layers.
        written: the TorchScript file.
        signature: how the file is called; None for a function's model.
    """

    source: str
    quantized: QuantizeReport | None
    written: TorchScriptReport
    signature: str | None


class LastHiddenState(nn.Module):
    """A transformers model with two tensors in and one out: what TorchScript and C++ can name."""

    SIGNATURE = "(input_ids int64 (batch, tokens), attention_mask the same) -> last_hidden_state (batch, tokens, width)"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return result


def export_source(
    source: str,
    target: Path,
    *,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] | None = None,
    overwrite: bool = False,
    step: Step = lambda text: nullcontext(),
) -> ExportReport:
    """Load a model by name, quantize it unless it has NF4 layers, and write it as TorchScript.

    Args:
        source: a Hugging Face model's directory, or "package.module:function"; the function returns a model, or a model
            and example inputs.
        target: the file to write.
        group_size, skip, only: as for quantize_model.
        overwrite: whether a file at ``target`` may be replaced.
        step: step("what") is entered for as long as that takes, for a progress display.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: ``source`` is neither, there is no such function, it or the model fails, or quantizing options are
            given for a model that has NF4 layers already.
        TypeError: the function returns something else than a module, or a module and example inputs.
        What quantize_model and export_torchscript raise.
    """
    refuse_target(target, overwrite)
    with step(f"Loading {source}"):
        model, example = load_source(source)
    quantized = None
    if not any(isinstance(layer, NF4Linear) for layer in model.modules()):
        with step("Quantizing its linear layers to NF4"):
            quantized = quantize_model(model, group_size=group_size or 64, skip=skip, only=only)
    elif group_size is not None or skip or only is not None:
        raise ValueError(f"{source} has NF4 layers already; --group-size, --skip and --only would change nothing")
    is_transformer = Path(source).is_dir()
    with step("Writing TorchScript, and running it in a fresh process"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "export_torchscript:")  # they are among the notes
        with offline_and_quiet() if is_transformer else nullcontext():
            module = LastHiddenState(model).eval() if is_transformer else model
            try:
                written = export_torchscript(module, target, example, overwrite=overwrite)
            except (ImportError, OSError, TypeError, ValueError, TorchScriptError):
                raise  # a sentence already
            except Exception as error:  # of the model's own, when it is called
                raise ValueError(f"{source} could not be exported: {what_was_raised(error)}") from error
    return ExportReport(source, quantized, written, LastHiddenState.SIGNATURE if is_transformer else None)


def load_source(source: str) -> tuple[nn.Module, Any]:
    """The model of this name, and its example inputs; None if it has none."""
    if Path(source).is_dir():
        return load_transformer(Path(source))
    function = FUNCTION.fullmatch(source)
    if function is None:
        raise ValueError(f"{source} is neither a directory nor package.module:function")
    return load_from_function(function["module"], function["function"])


def load_transformer(folder: Path) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A transformers model and example inputs (ids, mask), each (2, 7) int64.

    On the CPU, in the dtype of its checkpoint. Nothing is fetched, and no code of the directory is run.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not the directory of a Hugging Face model")
    with offline_and_quiet():
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model = transformers.AutoModel.from_pretrained(str(folder), dtype="auto", local_files_only=True)
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, which does not take input_ids and attention_mask alone; "
            "write a function that returns (model, example_inputs) and export package.module:function"
        )
    model.config.use_cache = False  # a decoder's cache is no tensor
    ids = torch.arange(14).remainder(model.config.vocab_size).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model.eval(), (ids, mask)


def load_from_function(module: str, name: str) -> tuple[nn.Module, Any]:
    """The model that a function returns, and its example inputs; None if it returns none.

    ``module`` is found as ``python -m`` finds it, in the working directory too.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"there is no module {error.name}, neither installed nor in {Path.cwd()}") from None
    except Exception as error:
        raise ValueError(f"{module} cannot be imported: {what_was_raised(error)}") from error
    if not callable(function):
        raise ValueError(f"{module} has no function {name}")
    try:
        result = function()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{module}:{name} failed: {what_was_raised(error)}") from error
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not isinstance(example, Tensor | Sequence | Mapping | None):
        raise TypeError(f"{module}:{name} has to return a module, or (module, example_inputs); got {kind_of(result)}")
    return model, example


def what_was_raised(error: Exception) -> str:
    """What code that is not ours raised, and on which line."""
    place = "" if isinstance(error, SyntaxError) else f" ({place_of(error)})"  # which says itself where it is
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def kind_of(value: Any) -> str:
    """The type of what a function returned, as an error names it."""
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
