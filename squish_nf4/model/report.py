"""What quantize_model says of a model: what it did, what it left alone and why, and what both weigh."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from squish_nf4.nn.packed import PackedModule


@dataclass(frozen=True)
class LayerReport:
    """One layer that quantize_model has quantized.

    Attributes:
        name: its dotted name in the model.
        shape: (out_features, in_features).
        group_size: columns that share a scale.
        bits_per_weight: stored bits (nibbles, padding and scales) per logical weight.
        relative_rms_error: ||W - decoded|| / ||W||; None on meta.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    bits_per_weight: float
    relative_rms_error: float | None


@dataclass(frozen=True)
class LeftAlone:
    """One module with a weight that was not quantized.

    Attributes:
        name: its dotted name in the model.
        reason: why it was left alone, in words.
        bytes: of its own parameters; a tied one counts wherever it stands.
    """

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class QuantizeReport:
    """What quantize_model did; printed, a table of the layers and what was left alone, the heaviest first.

    Attributes:
        layers: what was quantized.
        left_alone: the other modules with a weight, and why.
        notes: what a careful reader would want to know, a sentence each.
        bytes_before: of all parameters and buffers of the model, each once.
        bytes_after: the same, now.
        bytes_dense: those of bytes_after that are no packed weights and scales.
    """

    layers: tuple[LayerReport, ...]
    left_alone: tuple[LeftAlone, ...]
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    bytes_dense: int

    def __str__(self) -> str:
        lines = [f"{'layer':<48} {'shape':>14} {'group':>5} {'bits':>5} {'rel. error':>10}"] if self.layers else []
        for layer in self.layers:
            error = "-" if layer.relative_rms_error is None else f"{layer.relative_rms_error:.4f}"
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:<48} {shape:>14} {layer.group_size:>5} {layer.bits_per_weight:>5.2f} {error:>10}"
            )
        lines += [f"left alone: {line}" for line in _grouped(self.left_alone)]
        lines += [f"note: {note}" for note in self.notes]
        count = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        done = f"{count} quantized" if self.layers else "nothing was quantized"
        share = self.bytes_dense / self.bytes_after if self.bytes_after else 0.0
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        lines.append(f"{done}; {sizes}, of which {share:.0%} are dense")
        return "\n".join(lines)


def _grouped(left_alone: tuple[LeftAlone, ...]) -> list[str]:
    """A line for each kind of module: names that differ in numbers, left alone for the same reason; heaviest first."""
    groups: defaultdict[tuple[str, str], list[LeftAlone]] = defaultdict(list)
    for entry in left_alone:
        groups[_without_numbers(entry.name), _without_numbers(entry.reason)].append(entry)
    weighed = [(sum(entry.bytes for entry in entries), group, entries) for group, entries in groups.items()]
    lines = []
    for size, (name, reason), entries in sorted(weighed, key=lambda group: -group[0]):
        if len(entries) == 1:
            name, reason = entries[0].name, entries[0].reason
        else:
            name = f"{name} ({len(entries)} modules)"
        lines.append(f"{name}: {_in_words(size)}: {reason}")
    return lines


def _without_numbers(text: str) -> str:
    """The text with * for each component of a dotted name that is a number."""
    return re.sub(r"(?<![^.\s])\d+(?=\.|$)", "*", text)


def _in_words(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor; one that is not strided counts as if it were."""
    return tensor.nbytes if tensor.layout == torch.strided else tensor.numel() * tensor.element_size()


def weigh(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters and buffers, and of those that are not in NF4; each tensor once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    packed = {id(t) for m in model.modules() if isinstance(m, PackedModule) for t in (m.weight, m.scales)}
    size_of = {key: bytes_of(tensor) for key, tensor in tensors.items()}
    return sum(size_of.values()), sum(size for key, size in size_of.items() if key not in packed)
