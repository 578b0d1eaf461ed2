"""The header of a .npy file, read and written. What it promises is known before a byte of the array is read.

numpy's own reader hands the text to ast.literal_eval, whose parser is deeper than this format needs. Here a header is
three known fields of plain text, of bounded length, or it is refused.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from squish_nf4.checkpoint.values import MOST_DIMENSIONS

MAGIC = b"\x93NUMPY"

LONGEST_HEADER = 4096  # bytes; numpy pads to 64 or 128

FIELDS = {"descr", "fortran_order", "shape"}

FIELD = re.compile(r"""\s*(['"])(\w+)\1\s*:\s*('[^'\\]*'|"[^"\\]*"|True|False|\([\d\s,L]*\))\s*(,|(?=\}))""", re.ASCII)

NUMBER_TYPE = re.compile(r"[<>=|]?[biufc]\d{1,2}", re.ASCII)

SHAPE = re.compile(r"\(\s*\)|\(\s*\d+L?\s*,\s*\)|\(\s*\d+L?(\s*,\s*\d+L?)+\s*,?\s*\)", re.ASCII)


@dataclass(frozen=True)
class Header:
    """What a header promises. start: where the array begins, in bytes."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.newbyteorder('=')} {self.shape}"


def read_header(read: Callable[[int], bytes]) -> Header:
    """Reads a header, of format version 1, 2 or 3, and no byte more; read(n) gives n bytes, fewer only at the end.

    Raises:
        ValueError: this is no .npy file, its header is too long, or its array holds no plain numbers.
    """
    start = read(8)
    if len(start) < 8 or start[:6] != MAGIC:
        raise ValueError("is no .npy file: it does not begin with \\x93NUMPY")
    version = start[6]
    if version not in (1, 2, 3):
        raise ValueError(f"is of .npy version {version}.{start[7]}; 1 to 3 are read")
    width = 2 if version == 1 else 4
    length = int.from_bytes(read(width), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"declares a header of {length} bytes; at most {LONGEST_HEADER} are read")
    text = read(length)
    if len(text) < length:
        raise ValueError(f"ends within its header ({len(text)} of {length} bytes)")
    fields = parse_fields(text.decode("utf-8" if version == 3 else "latin-1", errors="replace"))
    shape = parse_shape(fields["shape"])
    dtype = parse_dtype(fields["descr"])
    if math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise ValueError(f"declares the shape {shape}, which no array can have")
    return Header(dtype, shape, fields["fortran_order"] == "True", 8 + width + length)


def parse_fields(text: str) -> dict[str, str]:
    """{field: its value's text} of "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }" """
    fields: dict[str, str] = {}
    place = len(text) - len(text.lstrip())
    if text[place : place + 1] == "{":
        place += 1
        while found := FIELD.match(text, place):
            if found[2] in fields:
                raise ValueError(f"has a header that says {found[2]} twice")
            fields[found[2]] = found[3]
            place = found.end()
    if "descr" not in fields and re.search(r"""["']descr["']\s*:\s*\[""", text):
        raise ValueError("holds records, which are no number type")
    if text[place:].strip() != "}" or fields.keys() != FIELDS:
        raise ValueError(f"has a header that is not understood: {text[:80].strip()!r}")
    if fields["fortran_order"] not in ("True", "False"):
        raise ValueError(f"has a header whose fortran_order is {fields['fortran_order']}")
    return fields


def parse_shape(text: str) -> tuple[int, ...]:
    if not SHAPE.fullmatch(text):
        raise ValueError(f"has a header whose shape is {text[:80]}")
    numbers = re.findall(r"\d+", text)
    if len(numbers) > MOST_DIMENSIONS:
        raise ValueError(f"declares {len(numbers)} dimensions; at most {MOST_DIMENSIONS} are read")
    if max(map(len, numbers), default=0) > 19:
        raise ValueError(f"declares the shape {text[:80]}, which no array can have")
    return tuple(int(number) for number in numbers)


def parse_dtype(text: str) -> np.dtype[np.generic]:
    name = text[1:-1]
    if name.lstrip("|<>=").startswith("O"):
        raise ValueError(
            "holds Python objects: that is a pickle, reading one may run anything, and it is never loaded; "
            "let its writer store plain numbers"
        )
    try:
        dtype = np.dtype(name) if text[0] in "'\"" and NUMBER_TYPE.fullmatch(name) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biufc":
        raise ValueError(f"holds {text[:40]}, which is no number type")
    return dtype


def npy_header(dtype: np.dtype[np.generic], shape: Sequence[int]) -> bytes:
    """The bytes that numpy.save writes before the values. ValueError: no reader would take so many dimensions."""
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"an array of {len(shape)} dimensions cannot be stored; at most {MOST_DIMENSIONS} can")
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def npy_nbytes(dtype: np.dtype[np.generic], shape: Sequence[int]) -> int:
    """The bytes of a .npy file of such an array, its header included."""
    return len(npy_header(dtype, shape)) + int(np.prod(shape, dtype=object)) * dtype.itemsize
