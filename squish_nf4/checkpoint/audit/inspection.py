"""inspect: what is in a squish directory, tensor by tensor, in numbers. How they are measured stands in measure.py."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from squish_nf4.checkpoint.audit.measure import Basis, Nf4Numbers, measure
from squish_nf4.checkpoint.directory.format import ENDS, SIDECAR, TENSORS
from squish_nf4.checkpoint.directory.reader import SquishDirectory, open_directory
from squish_nf4.checkpoint.directory.stored_tensor import StoredTensor
from squish_nf4.checkpoint.messages import Progress, shorten
from squish_nf4.checkpoint.source.shard_file import opened_shard
from squish_nf4.checkpoint.source.shards import Entry, open_source
from squish_nf4.checkpoint.values import WIDENED, Array, dtype_name
from squish_nf4.layout import stored_bits_per_weight
from squish_nf4.ops import relative_error


@dataclass(frozen=True)
class Inspected:
    """One tensor of what was inspected.

    Attributes:
        name: its name.
        tied_to: the tensor whose files it has, if they are another's.
        shape: its shape, as the model has it.
        stored_as: "nf4", or the dtype it was kept in.
        reason: why it was kept, as squish_nf4.json records it; None where nothing does.
        source_dtype: the dtype it had before, likewise.
        nbytes: of its files, or of its values in a .safetensors file.
        bits_per_weight: scales included, file headers not, before compression.
        nf4: what was measured, if it is in NF4.
    """

    name: str
    tied_to: str | None
    shape: tuple[int, ...]
    stored_as: str
    reason: str | None
    source_dtype: str | None
    nbytes: int
    bits_per_weight: float
    nf4: Nf4Numbers | None = None

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What inspect found, tensor by tensor and in sums, which count tied tensors once.

    Attributes:
        path: what was inspected.
        source: what errors were measured against, if anything.
        tensors: in the order of the file; tied ones under each name.
        seconds: how long it took.
    """

    path: Path
    source: Path | None
    tensors: tuple[Inspected, ...]
    seconds: float

    @property
    def owned(self) -> list[Inspected]:
        """Every stored tensor once."""
        return [tensor for tensor in self.tensors if tensor.tied_to is None]

    @property
    def in_nf4(self) -> list[tuple[Inspected, Nf4Numbers]]:
        """The tensors in NF4, each once, with what was measured of them."""
        return [(tensor, tensor.nf4) for tensor in self.owned if tensor.nf4]

    @property
    def weights(self) -> int:
        """How many values there are."""
        return sum(tensor.size for tensor in self.owned)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.owned)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of all tensors together."""
        return sum(tensor.bits_per_weight * tensor.size for tensor in self.owned) / max(1, self.weights)

    @property
    def nf4_bits_per_weight(self) -> float:
        """Bits a weight of those in NF4."""
        weights = sum(tensor.size for tensor, _ in self.in_nf4)
        return sum(tensor.bits_per_weight * tensor.size for tensor, _ in self.in_nf4) / max(1, weights)

    @property
    def relative_rms(self) -> float:
        """The relative error of all weights in NF4 together."""
        norm = sum(numbers.squared_norm for _, numbers in self.in_nf4)
        error = sum(numbers.squared_norm * numbers.relative_rms * numbers.relative_rms for _, numbers in self.in_nf4)
        return relative_error(error, norm)

    @property
    def indices(self) -> tuple[int, ...]:
        """How often each level is used, in all tensors."""
        return tuple(map(sum, zip(*(numbers.indices for _, numbers in self.in_nf4), strict=True))) or (0,) * 16

    @property
    def bases(self) -> list[Basis]:
        """Where the errors come from, without repetition."""
        return list(dict.fromkeys(numbers.basis for _, numbers in self.in_nf4))

    @property
    def groups(self) -> str:
        """Where the errors of single groups come from: no record has them."""
        return "measured" if self.bases == ["measured"] else "estimated"


@dataclass
class Contents:
    """What there is to look at.

    tensors: by name, in the order of the file. loads: of each that is in NF4 and has files of its own, what reads its
    packed bytes and scales. recorded: the relative errors that squish_nf4.json records.
    """

    tensors: dict[str, Inspected] = field(default_factory=dict)
    loads: dict[str, Callable[[], tuple[Array, Array]]] = field(default_factory=dict)
    recorded: dict[str, float] = field(default_factory=dict)


def inspect(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Inspection:
    """Look at every tensor of a squish directory, or at one file.

    Args:
        path: a squish directory; one .npy file of it, for its tensor alone; or a .safetensors file, in which a uint8
            X.weight beside a float32 X.scales is an NF4Linear's.
        source: what it was made of, to measure errors: a .safetensors file or a model's directory.
        progress: called as each tensor begins.

    Raises:
        FileNotFoundError: path or source is not there.
        ValueError: one of them cannot be read, or a tensor has another shape in the source.
    """
    started = time.perf_counter()
    path = Path(path)
    contents = contents_of(path)
    original = open_source(Path(source)) if source is not None else None
    announce = progress or (lambda _: None)
    total, done = sum(tensor.nbytes for tensor in contents.tensors.values()), 0
    numbers: dict[str, Nf4Numbers] = {}

    def look(name: str, w: Tensor | None) -> None:
        nonlocal done
        announce(Progress(name, done, total))
        packed, scales = contents.loads[name]()
        exact = None if w is None else as_matrix(contents.tensors[name], w, packed)
        numbers[name] = measure(packed, scales, exact, contents.recorded.get(name))
        done += contents.tensors[name].nbytes

    for entry, w in original.tensors() if original else ():
        if entry.name in contents.loads:
            look(entry.name, w)
    for name in contents.loads:
        if name not in numbers:
            look(name, None)
    tensors = [replace(tensor, nf4=numbers.get(tensor.tied_to or name)) for name, tensor in contents.tensors.items()]
    seconds = time.perf_counter() - started
    return Inspection(path, Path(source) if source is not None else None, tuple(tensors), seconds)


def as_matrix(tensor: Inspected, w: Tensor, packed: Array) -> Tensor:
    """The source's tensor in the rows that are packed. ValueError: it has another shape, or holds no weights."""
    if tuple(w.shape) != tensor.shape or not w.is_floating_point():
        found = f"{dtype_name(w.dtype)} {tuple(w.shape)}"
        raise ValueError(f"tensor {shorten(tensor.name)} has shape {tensor.shape}; in the source it is {found}")
    return (w.float() if w.dtype in WIDENED else w).reshape(packed.shape[0], 2 * packed.shape[1])


def contents_of(path: Path) -> Contents:
    """What path holds. FileNotFoundError, ValueError: it is nothing that inspect takes, or damaged."""
    if path.name.endswith(".safetensors"):
        return in_safetensors(path)
    if path.name.endswith(ENDS):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        directory = path.absolute().parent.parent
        if path.absolute().parent.name != TENSORS:
            raise ValueError(f"{path} is in no squish directory; only files in a folder {TENSORS} are")
        found = in_directory(open_directory(directory), path.name)
        if not found.tensors:
            raise ValueError(f"{path} is of no tensor of {directory}")
        return found
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is neither a squish directory nor a .npy, .npy.zst or .safetensors file")
    return in_directory(open_directory(path))


def in_directory(directory: SquishDirectory, file_name: str | None = None) -> Contents:
    """All tensors of a directory, or the one that a file belongs to."""
    contents = Contents()
    for name, tensor in directory.tensors.items():
        tied = tensor.name != name
        if file_name is not None and (tied or file_name not in {file.path.name for file in tensor.files.values()}):
            continue
        record = (directory.records or {}).get(tensor.name, {})
        reason, dtype = record.get("reason"), record.get("source_dtype")
        contents.tensors[name] = Inspected(
            name=name,
            tied_to=tensor.name if tied else None,
            shape=tensor.shape,
            stored_as="nf4" if tensor.kind == "nf4" else str(tensor.files["__pt"].dtype),
            reason=reason if isinstance(reason, str) else None,
            source_dtype=dtype if isinstance(dtype, str) else None,
            nbytes=tensor.nbytes,
            bits_per_weight=tensor.bits_per_weight,
        )
        if tensor.kind == "nf4" and not tied:
            contents.loads[name] = partial(load_unchanged, directory, tensor)
        if (error := recorded_error(directory, tensor)) is not None:
            contents.recorded[name] = error
    return contents


def recorded_error(directory: SquishDirectory, tensor: StoredTensor) -> float | None:
    """The relative error that its converter measured, if it says so. ValueError: what it says is none."""
    found = (directory.records or {}).get(tensor.name, {}).get("relative_error")
    if found is None:
        return None
    if type(found) not in (int, float) or not 0 <= found <= sys.float_info.max:  # which NaN is not either
        raise ValueError(
            f"{directory.path / SIDECAR} records the relative_error {found!r:.100} of tensor {shorten(tensor.name)}; a "
            "finite number is wanted, 0 or more"
        )
    return float(found)


def load_unchanged(directory: SquishDirectory, tensor: StoredTensor) -> tuple[Array, Array]:
    with directory.snapshot.held():
        return tensor.load_nf4()


def in_safetensors(path: Path) -> Contents:
    """The tensors of a .safetensors file: the state of a quantized model, or any other."""
    entries = {entry.name: entry for entry in open_source(path).entries}
    scales_of = {name: scales for name, entry in entries.items() if (scales := find_scales(entry, entries))}
    hidden = {scales.name for scales in scales_of.values()}
    contents = Contents()
    for name, entry in entries.items():
        if name in hidden:
            continue
        shape, nbytes, stored_as = entry.shape, entry.nbytes, dtype_name(entry.dtype)
        group_size = None
        if scales := scales_of.get(name):
            shape, nbytes, stored_as = (shape[0], 2 * shape[1]), nbytes + scales.nbytes, "nf4"
            group_size = shape[1] // scales.shape[1]
            contents.loads[name] = partial(load_pair, path, name, scales.name)
        columns = shape[-1] if shape else 1
        bits = stored_bits_per_weight(columns, group_size, entry.dtype.itemsize) if entry.numel else 0.0
        contents.tensors[name] = Inspected(name, None, shape, stored_as, None, None, nbytes, bits)
    return contents


def find_scales(entry: Entry, entries: dict[str, Entry]) -> Entry | None:
    """The scales of a packed weight of an NF4Linear; None for any other tensor."""
    if not entry.name.endswith("weight") or entry.dtype != torch.uint8 or len(entry.shape) != 2:
        return None
    scales = entries.get(f"{entry.name.removesuffix('weight')}scales")
    if scales is None or scales.dtype != torch.float32 or len(scales.shape) != 2:
        return None
    if not scales.shape[1] or scales.shape[0] != entry.shape[0] or 2 * entry.shape[1] % scales.shape[1]:
        raise ValueError(
            f"{shorten(entry.name)} {entry.shape} and {shorten(scales.name)} {scales.shape} do not belong together"
        )
    return scales


def load_pair(path: Path, packed: str, scales: str) -> tuple[Array, Array]:
    with opened_shard(path) as file:
        return file.get_tensor(packed).numpy(), file.get_tensor(scales).numpy()
