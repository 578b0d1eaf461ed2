"""export_torchscript: a model as one TorchScript file, tried in a fresh process before it gets its name.

What the fresh process does, and when two results are equal, stands in fresh_process.py. See docs/torchscript.md.
"""

from __future__ import annotations

import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squish_nf4.example_calls import Call, Leaves, as_call, copied, resized_calls, run
from squish_nf4.fresh_process import FreshRun, TorchScriptError, compare, run_fresh
from squish_nf4.fresh_run import leaves
from squish_nf4.linear import NF4Linear

TracerWarning: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
DEPRECATION = (
    "TorchScript is deprecated: PyTorch still writes and runs it, and recommends torch.export for new programs "
    "(docs/torchscript.md)"
)
INSTEAD = "use torch.export or AOTInductor instead (docs/export.md)"
REASON_COMES_LAST = ("The following operation failed", "Tracer cannot infer type")
TORCHS_OWN_WARNING = r"`?torch\.jit\.\w+`? is (deprecated|not supported)"


@dataclass(frozen=True)
class TorchScriptReport:
    """What export_torchscript wrote.

    Attributes:
        path: the file.
        bytes: its size.
        route: how it was made.
        why_traced: what scripting the model failed with, if it was traced.
        nf4_layers: how many NF4Linear the model has.
        operators: those of squish that the file calls; with none of them it runs without the op library.
        same_bits: whether the fresh process returned what eager did, bit for bit; None if it was not run.
        max_difference: the largest absolute difference from eager; None if it was not run.
        free_dimensions: of the inputs; a trace was found right at another size of these, too.
        notes: a sentence each.
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
        """In one sentence."""
        if self.same_bits is None:
            return "loaded in a fresh process with only the op library, not run: there were no example inputs"
        found = "the same bits as eager" if self.same_bits else f"at most {self.max_difference:.3g} from eager"
        sizes = " and ".join(f"dimension {dimension}" for dimension in self.free_dimensions)
        tried = f"also at another size of {sizes} of the inputs" if sizes else "at the sizes of the example alone"
        return f"run in a fresh process with only the op library: {found}{f', {tried}' if self.why_traced else ''}"

    def __str__(self) -> str:
        layers = f"{self.nf4_layers} NF4 layer{'' if self.nf4_layers == 1 else 's'}"
        lines = [f"{self.path}: {self.route}, {layers}, {self.bytes:,} bytes"]
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
        model: in eval mode, with its weights loaded; it is not changed.
        path: the file to write, usually *.pt.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. Without
            them the model is scripted or refused, and the file is loaded but not run.
        overwrite: whether a file at ``path`` may be replaced. That happens last and at once.

    Returns:
        The route, the size, how it compared with eager, and notes on what to look out for.

    Raises:
        TorchScriptError: neither route takes the model, or the results differ by more than rounding. No file is left.
        ValueError: the model is in training mode, or holds tensors without values.
        TypeError: ``model`` is not a module, or one that torch.jit or torch.compile made.
        FileExistsError: ``path`` exists, and ``overwrite`` is not given.

    Warns:
        UserWarning: the trace is wrong at other sizes than those of the example inputs (also among the notes).
    """
    target = Path(path)
    refuse_target(target, overwrite)
    refuse_unready(model)
    with torchs_warning_off():
        example = None if example_inputs is None else as_call(example_inputs)
        expected = None if example is None else list(leaves(run(model, example)))
        module, why_traced, notes = scripted_or_traced(model, example)
        resized = resized_calls(model, example) if why_traced and example else {}
        calls = [] if example is None else [example, example, *(call for call, _ in resized.values())]
        with written_beside(target, module) as file:
            fresh = run_fresh(file, [copied(call) for call in calls])  # a call may write into its inputs
            same_bits, difference = agreement_with_eager(fresh, expected)
    free, bound = sizes_that_vary(fresh, resized)
    for note in bound:
        warnings.warn(f"export_torchscript: {note}", stacklevel=2)
    if not fresh.operators:
        notes.append("it calls no operator of squish_nf4: an ordinary TorchScript file")
    if any(isinstance(t, Tensor) and bool(t.isnan().any()) for _, t in expected or ()):
        notes.append("results on the example inputs hold NaN, so that the comparison says little")
    return TorchScriptReport(
        path=target,
        bytes=target.stat().st_size,
        route="traced" if why_traced else "scripted",
        why_traced=why_traced,
        nf4_layers=sum(isinstance(layer, NF4Linear) for layer in model.modules()),
        operators=fresh.operators,
        same_bits=same_bits,
        max_difference=difference,
        free_dimensions=free,
        notes=(*bound, *notes),
    )


@contextmanager
def written_beside(target: Path, module: Any) -> Iterator[Path]:
    """The saved module in a folder of its own, which takes its final name if nothing is raised; else it is gone."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        file = Path(folder, target.name)
        torch.jit.save(module, file)
        yield file
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(target)


def refuse_target(path: Path, overwrite: bool) -> None:
    """Before any work."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export_torchscript: the directory {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"export_torchscript: {path} is a directory; name a file in it")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"export_torchscript: {path} exists; overwrite=True replaces it")


def refuse_unready(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_torchscript: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("export_torchscript: the model is TorchScript already; torch.jit.save writes it")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # what torch.compile returns
        raise TypeError("export_torchscript: the model is compiled; pass the one that was given to torch.compile")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"export_torchscript: {f'{name} of the model' if name else 'the model'} is in training mode, which "
                "would be written into the file; call model.eval() first"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"export_torchscript: {name} is on the meta device and has no values; load them first")
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise ValueError(
                f"export_torchscript: {name} is a {type(tensor).__name__}; TorchScript saves plain tensors"
            )


@contextmanager
def torchs_warning_off() -> Iterator[None]:
    """torch says at every call that TorchScript is deprecated; we say it in the report."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", TORCHS_OWN_WARNING, category)
        yield


def scripted_or_traced(model: nn.Module, example: Call | None) -> tuple[Any, str | None, list[str]]:
    """The ScriptModule; if it was traced, why; and what torch warned of while tracing."""
    try:
        module: Any = torch.jit.script(model)
        if example is not None:
            run(module, example)
        return module, None, []
    except Exception as error:  # whatever the compiler or the compiled model raises, it is not scriptable
        not_scripted = in_one_line(error)
    if example is None:
        raise TorchScriptError(
            f"export_torchscript: the model cannot be scripted: {not_scripted}; "
            f"give example_inputs to trace it, or {INSTEAD}"
        )
    try:
        with tracer_warnings() as notes:
            args, kwargs = copied(example)
            inputs = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
            # strict would refuse results that are dicts; the check would trace twice, and ours is stricter
            module = torch.jit.trace(model, **inputs, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise TorchScriptError(
            "export_torchscript: TorchScript cannot take this model; "
            f"scripting: {not_scripted}; tracing: {in_one_line(error)}; {INSTEAD}"
        ) from None
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


def in_one_line(error: Exception) -> str:
    """What torch says of a model, and the line of the model that it is about."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))
    lines = [line.strip(" :.") for line in text.splitlines() if line.strip(" :.")] or [type(error).__name__]
    said = lines[-1 if lines[0].startswith(REASON_COMES_LAST) else 0][:300]
    places = [(file, line) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text) if Path(file).is_file()]
    if not places:
        frames = traceback.extract_tb(error.__traceback__)
        own = (__file__, str(Path(torch.__file__).parent))
        places = [(frame.filename, str(frame.lineno)) for frame in frames if not frame.filename.startswith(own)]
    return f"{said} ({Path(places[-1][0]).name}:{places[-1][1]})" if places else said


def agreement_with_eager(fresh: FreshRun, expected: Leaves | None) -> tuple[bool | None, float | None]:
    """Of the first two calls: TorchScript optimizes after the first."""
    if expected is None:
        return None, None
    agreements = [compare(found, expected) for found in fresh.outputs[:2]]
    for which, agreement in zip(("", " at the second call"), agreements, strict=True):
        if agreement.misfit is not None:
            raise TorchScriptError(
                f"export_torchscript: in a fresh process the exported model is wrong{which}: {agreement.misfit}; "
                "nothing was written (a model that draws random numbers or keeps a state cannot be compared)"
            )
    return all(agreement.same_bits for agreement in agreements), max(agreement.difference for agreement in agreements)


def sizes_that_vary(
    fresh: FreshRun, resized: Mapping[int, tuple[Call, Leaves]]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The dimensions of the inputs that may have another size than in the example, and a sentence on each other."""
    free, bound = [], []
    for (dimension, (_, expected)), found in zip(resized.items(), fresh.outputs[2:], strict=True):
        agreement = compare(found, expected)
        if agreement.misfit is None:
            free.append(dimension)
        else:
            bound.append(
                f"the trace holds for the example's size of dimension {dimension} of the inputs alone; at another "
                f"size, which the model itself takes: {agreement.misfit}"
            )
    return tuple(free), tuple(bound)
