"""export_torchscript: a model as one TorchScript file, tried in a fresh process before it gets its name.

How it is made stands in script_or_trace.py, what the fresh process does in trial_program.py, when two results are equal
in comparison.py. See docs/torchscript.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squish_nf4.nn.linear import NF4Linear
from squish_nf4.replace import written_beside
from squish_nf4.torchscript.calls import Call, as_call, copied, resized_calls, run
from squish_nf4.torchscript.comparison import Comparison, compare
from squish_nf4.torchscript.model_state import ModelState, state_kept
from squish_nf4.torchscript.refusals import TorchScriptError, refuse_target, refuse_unready
from squish_nf4.torchscript.saving import save
from squish_nf4.torchscript.script_or_trace import scripted_or_traced, torchs_warning_off
from squish_nf4.torchscript.trial import Trial, try_in_fresh_process
from squish_nf4.torchscript.trial_program import Leaves, results

DEPRECATION = (
    "TorchScript is deprecated: PyTorch still writes and runs it, and recommends torch.export for new programs "
    "(docs/torchscript.md)"
)
CALLS = 2  # how often the example is called: TorchScript optimizes after the first


@dataclass(frozen=True)
class TorchScriptReport:
    """What export_torchscript wrote.

    Attributes:
        path: the file.
        bytes: size of the file.
        route: how it was made.
        why_traced: what scripting the model failed with, if it was traced.
        nf4_layers: how many NF4Linear the model has, scripted ones too.
        operators: those of squish that the file calls; with none of them it runs without the op library.
        same_bits: whether the fresh process returned what eager did, bit for bit, at the sizes of the example and at
            other ones of free_dimensions; None if it was not run.
        max_difference: the largest absolute difference from eager in the same calls; None if it was not run.
        free_dimensions: dimensions of the inputs; a trace was found right, up to rounding, at another size of these.
        notes: what to look out for, a sentence each.
    """

    path: Path
    bytes: int
    route: Literal["scripted", "traced"]
    why_traced: str | None
    nf4_layers: int
    operators: tuple[str, ...]
    same_bits: bool | None
    max_difference: float | None
    free_dimensions: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def verification(self) -> str:
        """How the file was tried and what came out, in one sentence."""
        if self.same_bits is None:
            return "loaded in a fresh process with only the op library, not run: there were no example inputs"
        found = "the same bits as eager" if self.same_bits else f"at most {self.max_difference:.3g} from eager"
        sizes = " and ".join(f"dimension {dimension}" for dimension in self.free_dimensions)
        tried = f"also at another size of {sizes} of the inputs" if sizes else "at the sizes of the example alone"
        return f"run in a fresh process with only the op library: {found}{f', {tried}' if self.why_traced else ''}"

    @property
    def contents(self) -> str:
        """What of NF4 is in the file, in words."""
        if self.nf4_layers == 0 and self.operators:
            return f"calls {' and '.join(self.operators)}"
        return f"{self.nf4_layers} NF4 layer{'' if self.nf4_layers == 1 else 's'}"

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.route}, {self.contents}, {self.bytes:,} bytes"]
        lines += [f"traced because it cannot be scripted: {self.why_traced}"] if self.why_traced else []
        lines += [self.verification, *(f"note: {note}" for note in self.notes), DEPRECATION]
        return "\n".join(lines)


def export_torchscript(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> TorchScriptReport:
    """Write a model as TorchScript, for Python without squish_nf4 and for C++: the op library is all that it needs.

    The model is scripted. If TorchScript cannot compile it, or the compiled model does not take the example inputs, it
    is traced. Before the file gets its name, a fresh process that never imports squish_nf4 loads it, runs it on the
    example inputs, and the results have to be those of the model.

    Args:
        model: in eval mode, with its weights loaded. Calls that change its state are undone, in the file too.
        path: the file to write, usually *.pt. A symbolic link is followed.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. Without
            them the model is scripted or refused, and the file is loaded but not run.
        overwrite: whether a file at ``path`` may be replaced. That happens last and at once.

    Returns:
        The route, the size, how it compared with eager, and notes on what to look out for.

    Raises:
        TorchScriptError: neither route takes the model, or the results differ by more than rounding. No file is left.
        ValueError: the model is in training mode, holds tensors without values, or writes into its parameters; or
            autocast is on.
        TypeError: ``model`` is not a module, torch.jit made it, or torch.compile it or a module in it; or the example
            inputs hold what TorchScript does not take.
        FileExistsError: ``path`` exists, and ``overwrite`` is not given, or it is no regular file.

    Warns:
        UserWarning: the trace is wrong at other sizes than those of the example inputs (also among the notes).
    """
    target = Path(path)
    refuse_target(target, overwrite)
    refuse_unready(model)
    example = None if example_inputs is None else as_call(example_inputs)
    with torchs_warning_off(), state_kept(model) as state:
        expected = [] if example is None else [results(run(model, example)) for _ in range(CALLS)]
        written, assigned = undone_changes(state)
        module, why_traced, notes = scripted_or_traced(model, example, state)
        resized = {}
        if example is not None and why_traced:
            for _ in range(CALLS if written or assigned else 0):
                run(model, example)  # the file has been called as often then
            resized = resized_calls(model, example)
            state.restore()
        calls = [] if example is None else [example] * CALLS + [call for call, _ in resized.values()]
        with written_beside(target) as file:
            save(module, file)
            trial = try_in_fresh_process(file, [copied(call) for call in calls])  # a call may write into its inputs
            comparison = compare_calls(trial, expected)
            if comparison.misfit is not None:
                why = why_wrong(model, calls[0], state, expected[0], assigned if why_traced else ())
                raise TorchScriptError(
                    f"export_torchscript: in a fresh process the exported model is wrong{comparison.misfit}{why}; "
                    "nothing was written"
                )
    other_sizes = compare_other_sizes(trial, resized)
    free = tuple(dimension for dimension, other in other_sizes.items() if other.misfit is None)
    bound = list(notes_on_bound_sizes(other_sizes))
    for note in bound:
        warnings.warn(f"export_torchscript: {note}", stacklevel=2)
    notes = [
        *bound,
        *notes_on_rounded_sizes(comparison, other_sizes),
        *notes_on_state(written, assigned, traced=why_traced is not None),
        *notes,
        *notes_on_results(trial, expected),
    ]
    for dimension in free:
        comparison &= other_sizes[dimension]
    return TorchScriptReport(
        path=target,
        bytes=target.stat().st_size,
        route="traced" if why_traced else "scripted",
        why_traced=why_traced,
        nf4_layers=sum(map(is_nf4_layer, model.modules())),
        operators=trial.operators,
        same_bits=comparison.same_bits if expected else None,
        max_difference=comparison.difference if expected else None,
        free_dimensions=free,
        notes=tuple(notes),
    )


def is_nf4_layer(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return bool(getattr(module, "original_name", "") == NF4Linear.__name__)
    return isinstance(module, NF4Linear)


def undone_changes(state: ModelState) -> tuple[list[str], list[str]]:
    """Undo what calls of the model wrote to and what they assigned; returns the names of both."""
    parameters = state.parameters_written()
    if parameters:
        raise ValueError(
            f"export_torchscript: a call of the model wrote into its parameter {parameters[0]}, which is not undone; "
            "what calls change has to be a buffer"
        )
    changes = state.written(), state.assigned()
    state.restore()
    return changes


def compare_calls(trial: Trial, expected: Sequence[Leaves]) -> Comparison:
    """Compare the calls of the example with eager's; a misfit says at which call."""
    comparison = Comparison()
    for found, wanted, at in zip(trial.outputs, expected, ("", " at the second call"), strict=False):
        comparison &= compare(found, wanted)
        if comparison.misfit is not None:
            return replace(comparison, misfit=f"{at}: {comparison.misfit}")
    return comparison


def why_wrong(model: nn.Module, example: Call, state: ModelState, expected: Leaves, not_traced: Sequence[str]) -> str:
    """What may explain a wrong result, as the end of a sentence."""
    state.restore()
    if not compare(results(run(model, example)), expected).same_bits:
        return "; eager itself gives another result each time, as a model does that draws random numbers"
    return f"; {assigned_in_vain(not_traced)}" if not_traced else ""


def assigned_in_vain(names: Sequence[str]) -> str:
    return f"calls of the model assign {', '.join(names)}; a trace does not, and goes on with what was there"


def compare_other_sizes(trial: Trial, resized: Mapping[int, tuple[Call, Leaves]]) -> dict[int, Comparison]:
    """{dimension of the inputs: how results compare at another size of it}."""
    return {
        dimension: compare(found, expected)
        for (dimension, (_, expected)), found in zip(resized.items(), trial.outputs[CALLS:], strict=True)
    }


def notes_on_bound_sizes(other_sizes: Mapping[int, Comparison]) -> Iterator[str]:
    for dimension, other in other_sizes.items():
        if other.misfit is not None:
            yield (
                f"the trace holds for the example's size of dimension {dimension} of the inputs alone; at another "
                f"size, which the model itself takes: {other.misfit}"
            )


def notes_on_rounded_sizes(comparison: Comparison, other_sizes: Mapping[int, Comparison]) -> Iterator[str]:
    for dimension, other in other_sizes.items():
        if comparison.same_bits and other.misfit is None and not other.same_bits:
            yield (
                f"the bits are eager's at the sizes of the example, but not at another size of dimension {dimension} "
                f"of the inputs (at most {other.difference:.3g} from eager): the trace rounds in another way there, or "
                "keeps a number that goes with the size"
            )


def notes_on_state(written: Sequence[str], assigned: Sequence[str], *, traced: bool) -> Iterator[str]:
    if traced and assigned:
        yield assigned_in_vain(assigned)
        assigned = ()
    if written or assigned:
        names = ", ".join(dict.fromkeys((*written, *assigned)))
        yield f"calls of the model change {names}; the file holds what was there before the export"


def notes_on_results(trial: Trial, expected: Sequence[Leaves]) -> Iterator[str]:
    if not trial.operators:
        yield "it calls no operator of squish_nf4: an ordinary TorchScript file"
    if any(isinstance(t, Tensor) and bool(t.isnan().any()) for _, t in (expected[0] if expected else ())):
        yield "results on the example inputs hold NaN, so that the comparison says little"
