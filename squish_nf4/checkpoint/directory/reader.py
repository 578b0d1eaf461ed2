"""The squish directory read: each tensor under its original name and in its original shape. See docs/loading.md.

Nothing in it is trusted. Opening a directory checks all that names, tables and headers can tell, and reads no values.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from squish_nf4.checkpoint.directory.format import MANIFEST, READY, SIDECAR, TENSORS
from squish_nf4.checkpoint.directory.snapshot import Snapshot
from squish_nf4.checkpoint.directory.stored_tensor import Folder, StoredTensor, open_tensor
from squish_nf4.checkpoint.directory.tables import Records, find_owners, read_manifest, read_sidecar
from squish_nf4.checkpoint.messages import brief, listed, shorten
from squish_nf4.checkpoint.resources import require_memory
from squish_nf4.checkpoint.values import WIDENED, dtype_name, dtype_named

FLOATS = {torch.float64, torch.float32, torch.float16, *WIDENED}


@dataclass(frozen=True)
class SquishDirectory:
    """A finished squish directory whose tables and headers agree.

    tensors: by name, in the order of the manifest; tied names have one and the same StoredTensor. records: what
    squish_nf4.json says of each tensor, None without it. copied: what it says of the small files, unchecked. unclaimed:
    files with our suffixes that belong to no tensor. snapshot: whether it is still there.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    records: Records | None
    copied: Any
    unclaimed: tuple[str, ...]
    snapshot: Snapshot

    @property
    def owned(self) -> list[StoredTensor]:
        """Every stored tensor once."""
        return [tensor for name, tensor in self.tensors.items() if tensor.name == name]

    @property
    def nbytes(self) -> int:
        """Bytes of the files of all tensors."""
        return sum(tensor.nbytes for tensor in self.owned)

    def source_dtypes(self) -> dict[str, torch.dtype]:
        """{name: the dtype before conversion}, as squish_nf4.json records it."""
        if self.records is None:
            raise ValueError(f'{self.path} has no {SIDECAR}, so dtype="source" is unknown; another program wrote it')
        return {name: self.source_dtype(tensor) for name, tensor in self.tensors.items()}

    def source_dtype(self, tensor: StoredTensor) -> torch.dtype:
        """The dtype one tensor had. ValueError: it is not recorded, or cannot have become what is stored."""
        name = shorten(tensor.name)
        recorded = (self.records or {}).get(tensor.name, {}).get("source_dtype")
        try:
            dtype = dtype_named(recorded if isinstance(recorded, str) else "")
        except ValueError:
            found = f"{recorded!r:.100} is none" if recorded is not None else "nothing is recorded"
            raise ValueError(f"{self.path / SIDECAR} does not say which dtype {name} had: {found}") from None
        if dtype != tensor.dtype and not (dtype in FLOATS and tensor.dtype in FLOATS):
            text = f"records that {name} was {dtype_name(dtype)}, and it is stored as {dtype_name(tensor.dtype)}"
            raise ValueError(f"{self.path / SIDECAR} {text}")
        return dtype


def load_npy_dir(
    path: str | os.PathLike[str], dtype: torch.dtype | Literal["source"] | None = None
) -> dict[str, Tensor]:
    """Read a squish directory: every tensor under its original name and in its original shape, on the CPU.

    Tied names get one and the same tensor. A tensor that is stored uncompressed in the dtype asked for is mapped: its
    values come from the disk when they are touched, and writing to it changes memory, never the file.

    Args:
        path: the directory; its files may be .npy or .npy.zst, and written by another program.
        dtype: of the floating-point tensors. None: float32. "source": what each tensor had before conversion, as
            squish_nf4.json records it. Integers, bool and complex always come in their own.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory is unfinished or damaged, was changed while it was read, holds a tensor in a form
            this library does not read or a value that dtype cannot hold, or takes more memory than there is.
        TypeError: dtype is not a floating-point type.
    """
    directory, dtypes = open_with_dtypes(path, dtype)
    sizes = {tensor.name: tensor.bytes_as(dtypes[tensor.name]) for tensor in directory.owned}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    what = f"{path}, read at once (its largest tensor is {shorten(largest)}; iter_npy_dir reads one at a time),"
    require_memory(sum(sizes.values()), what)
    return dict(read_all(directory, dtypes))


def iter_npy_dir(
    path: str | os.PathLike[str], dtype: torch.dtype | Literal["source"] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """load_npy_dir, one (name, tensor) at a time, in the order of the manifest.

    The whole directory is checked at the first step, values apart. The iterator holds no tensor but those that a later
    name is tied to.
    """
    yield from read_all(*open_with_dtypes(path, dtype))


def open_with_dtypes(
    path: str | os.PathLike[str], dtype: torch.dtype | Literal["source"] | None
) -> tuple[SquishDirectory, dict[str, torch.dtype]]:
    wanted = torch.float32 if dtype is None else dtype
    if wanted != "source" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise TypeError(f'load_npy_dir: dtype must be a floating-point dtype, "source" or None, got {dtype!r}')
    directory = open_directory(path)
    return directory, directory.source_dtypes() if wanted == "source" else dict.fromkeys(directory.tensors, wanted)


def read_all(directory: SquishDirectory, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    def read(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
        with directory.snapshot.held():
            return stored.read(dtype)

    uses = Counter(tensor.name for tensor in directory.tensors.values())
    shared: dict[str, Tensor] = {}
    for name, stored in directory.tensors.items():
        uses[stored.name] -= 1
        if stored.name in shared:
            yield name, shared[stored.name] if uses[stored.name] else shared.pop(stored.name)
        elif uses[stored.name]:
            shared[stored.name] = read(stored, dtypes[name])
            yield name, shared[stored.name]
        else:
            yield name, read(stored, dtypes[name])


def open_directory(path: str | os.PathLike[str]) -> SquishDirectory:
    """Opens a squish directory and checks everything but values.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is unfinished, or its tables, names, links, headers and sizes do not fit together.
    """

    def refuse(error: ValueError) -> None:
        raise error

    return open_leniently(path, refuse)


def open_leniently(path: str | os.PathLike[str], complain: Callable[[ValueError], None]) -> SquishDirectory:
    """open_directory, which goes on without the tensors that cannot be read: each is complained of.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is unfinished, a table cannot be read, or it was changed meanwhile.
    """
    path = Path(path)
    snapshot = Snapshot(path)
    require_finished(path)
    with snapshot.held():
        return open_all(path, complain, snapshot)


def open_all(path: Path, complain: Callable[[ValueError], None], snapshot: Snapshot) -> SquishDirectory:
    manifest = read_manifest(path)
    sidecar = read_sidecar(path)
    records: Records | None = sidecar and sidecar["tensors"]
    owners = find_owners(path, manifest, records or {})
    folder = Folder(path / TENSORS)
    stored: dict[str, StoredTensor] = {}
    for owner in dict.fromkeys(owners.values()):
        try:
            stored[owner] = open_tensor(folder, owner, manifest[owner])
            require_recorded(path, stored[owner], (records or {}).get(owner, {}))
        except ValueError as error:
            complain(error)
    unclaimed = folder.unclaimed(manifest.values())
    if records is not None:
        if lost := [name for name in records if name not in manifest]:
            text = f"{path / SIDECAR} records tensors that {MANIFEST} does not name: {listed(lost)}"
            complain(ValueError(text))
        if unclaimed:
            text = f"{path / TENSORS} holds files of no tensor that {MANIFEST} names: {listed(unclaimed)}"
            complain(ValueError(text))
    tensors = {name: stored[owner] for name, owner in owners.items() if owner in stored}
    return SquishDirectory(path, tensors, records, sidecar and sidecar.get("copied"), tuple(unclaimed), snapshot)


def require_finished(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory")
    if not (path / TENSORS / READY).exists():
        raise ValueError(f"{path} is not a finished squish directory: it has no {TENSORS}/{READY}")


def require_recorded(path: Path, tensor: StoredTensor, record: Mapping[str, Any]) -> None:
    """Holds a tensor to its record, as far as headers tell; what a record does not mention is not wanted of it."""
    name = shorten(tensor.name)
    found: dict[str, Any] = {"kind": tensor.kind, "shape": list(tensor.shape), "group_size": tensor.group_size}
    for what, value in found.items():
        if record.get(what, value) != value:
            text = f"{path / SIDECAR} records {what} {record[what]!r:.100}, and its files have {value!r:.100}"
            raise ValueError(f"tensor {name}: {text}")
    sizes = {file.path.name: file.nbytes for file in tensor.files.values()}
    recorded = recorded_files(record)
    if recorded is not None and recorded != sizes:
        wrong = min(file for file in recorded.keys() | sizes if recorded.get(file) != sizes.get(file))
        says = f"{recorded[wrong]!r:.100}" if wrong in recorded else "no such file"
        text = f"has {sizes.get(wrong, 'no')} bytes; {SIDECAR} records {says}"
        raise ValueError(f"tensor {name}: {brief(path / TENSORS / wrong)} {text}")


def recorded_files(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """{file name: bytes} of a record; None if it does not list files."""
    files = record.get("files")
    if not isinstance(files, dict):
        return None
    return {name: file.get("bytes") if isinstance(file, dict) else None for name, file in files.items()}
