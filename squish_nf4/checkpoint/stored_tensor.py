"""One tensor of a squish directory, from its .npy files back to a torch tensor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squish_nf4.checkpoint.lossless import Array, dtype_name
from squish_nf4.checkpoint.names import shorten
from squish_nf4.checkpoint.npy_file import find_npy, read_npy
from squish_nf4.ops import COMPUTE_DTYPES, dequantize_nf4


def read_tensor(folder: Path, name: str, key: str, dtype: torch.dtype) -> Tensor:
    """The tensor stored under key, in its original shape; dtype is for floating-point values only.

    Raises:
        ValueError: its files are missing, damaged, at odds with each other, or of a form not read here.
    """
    try:
        values = read_values(folder, key, dtype)
        shape = find_npy(folder, f"{key}__shape")
        return values.reshape(read_shape(shape, values.numel())) if shape else values
    except ValueError as error:
        raise ValueError(f"tensor {shorten(name)}: {error}") from error


def read_values(folder: Path, key: str, dtype: torch.dtype) -> Tensor:
    packed, scales, kept, pickled = (find_npy(folder, key + end) for end in ("__nf4", "__s_nf4", "__pt", "__pt_df11"))
    if pickled:
        raise ValueError(
            f"{pickled.name} is a pickle of another program, and reading a pickle may run anything; "
            "let that program write the tensor as __pt.npy"
        )
    if packed and scales and not kept:
        return decode(read_npy(packed), read_npy(scales), dtype)
    if kept and not packed and not scales:
        return to_tensor(read_npy(kept), dtype)
    raise ValueError(
        f"wanted are {key}__nf4.npy with {key}__s_nf4.npy, or {key}__pt.npy alone; found: {forms(folder, key)}"
    )


def forms(folder: Path, key: str) -> str:
    """The files of this tensor, for a message. A second "__" in the rest means that the file is another tensor's."""
    ends = [file.name.removeprefix(key) for file in folder.iterdir() if file.name.startswith(f"{key}__")]
    return ", ".join(sorted(end for end in ends if "__" not in end[2:])) or "nothing"


def decode(packed: Array, scales: Array, dtype: torch.dtype) -> Tensor:
    """(rows, d) from the packed bytes. The group size is stored nowhere: it is the ratio of the two widths."""
    if packed.dtype != np.uint8 or scales.dtype != np.float32:
        raise ValueError(f"__nf4 must be uint8 and __s_nf4 float32, got {packed.dtype} and {scales.dtype}")
    fits = packed.ndim == scales.ndim == 2 and len(packed) == len(scales) and scales.shape[1] > 0
    if not fits or 2 * packed.shape[1] % scales.shape[1]:
        raise ValueError(f"__nf4 {packed.shape} and __s_nf4 {scales.shape} do not belong together")
    group_size = 2 * packed.shape[1] // scales.shape[1]
    rounded = dtype if dtype in COMPUTE_DTYPES else torch.float32
    return dequantize_nf4(to_tensor(packed), to_tensor(scales), group_size, dtype=rounded).to(dtype)


def to_tensor(values: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    try:
        tensor = torch.from_numpy(values).contiguous()
    except TypeError as error:
        raise ValueError(f"torch has no {values.dtype}") from error
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if tensor.dtype == torch.float64 and bool((tensor.isfinite() & ~converted.isfinite()).any()):
        raise ValueError(f"holds values that {dtype_name(dtype)} cannot; read it with dtype='source' or torch.float64")
    return converted


def read_shape(path: Path, numel: int) -> list[int]:
    shape = read_npy(path)
    sizes = [int(size) for size in shape.tolist()] if shape.ndim == 1 and shape.dtype.kind in "iu" else [-1]
    if min(sizes, default=0) < 0 or math.prod(sizes) != numel:
        raise ValueError(f"{path} is not the shape of {numel} values")
    return sizes
