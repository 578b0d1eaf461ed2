"""The two ways to TorchScript: a model is scripted where torch can compile it, and traced elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squish_nf4.torchscript.calls import Call, copied, has_named_tuples, run
from squish_nf4.torchscript.model_state import ModelState
from squish_nf4.torchscript.refusals import TorchScriptError, in_one_line

TracerWarning: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
INSTEAD = "use torch.export or AOTInductor instead (docs/compile-and-export.md)"
TORCHS_OWN_WARNING = r"`?torch\.jit\.\w+`? is (deprecated|not supported)"


@contextmanager
def torchs_warning_off() -> Iterator[None]:
    """Keep torch from saying at every call that TorchScript is deprecated; our report says it once."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", TORCHS_OWN_WARNING, category)
        yield


def scripted_or_traced(model: nn.Module, example: Call | None, state: ModelState) -> tuple[Any, str | None, list[str]]:
    """The ScriptModule, with the model's state; if it was traced, why; and what torch warned of while tracing."""
    try:
        module: Any = torch.jit.script(model)
        if example is None:
            return module, None, []
        run(module, example)
        state.restore()
        return torch.jit.script(model), None, []  # the first one keeps what its call assigned
    except Exception as error:  # whatever the compiler or the compiled model raises, it is not scriptable
        not_scripted = in_one_line(error)
    if example is None:
        raise TorchScriptError(
            f"export_torchscript: the model cannot be scripted: {not_scripted}; "
            f"give example_inputs to trace it, or {INSTEAD}"
        )
    state.restore()
    args, kwargs = copied(example)
    try:
        with tracer_warnings() as notes:
            inputs = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
            # strict would refuse results that are dicts; the check would trace twice, and ours is stricter
            module = torch.jit.trace(model, **inputs, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:
        unnamed = (
            " (a NamedTuple keeps its names in a trace if it is a keyword argument)" if has_named_tuples(args) else ""
        )
        raise TorchScriptError(
            "export_torchscript: TorchScript cannot take this model; "
            f"scripting: {not_scripted}; tracing: {in_one_line(error)}{unnamed}; {INSTEAD}"
        ) from None
    state.restore()
    return module, not_scripted, notes


@contextmanager
def tracer_warnings() -> Iterator[list[str]]:
    """What torch warns of while it traces, as one note at most. Other warnings go where they always go."""
    notes: list[str] = []
    places: dict[str, None] = {}  # in order, each once
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=TracerWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, TracerWarning):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if places:
        notes.append(
            "the trace keeps Python values (sizes, branches taken) that the model reads from tensors, as torch warns: "
            + ", ".join(places)
        )
