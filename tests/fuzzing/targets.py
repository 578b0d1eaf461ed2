"""What a fuzzer calls: functions of any bytes that return where the input was read or refused as it should be.

Anything else (another exception, a promise that does not hold) is a bug. tests/checkpoint/test_fuzzing.py calls them on
the seeds and on what hypothesis makes; __main__.py lets a coverage-guided fuzzer call them for as long as one likes.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import zstandard

from squish_nf4.checkpoint.audit.diff import diff
from squish_nf4.checkpoint.audit.inspection import inspect
from squish_nf4.checkpoint.audit.verify import verify
from squish_nf4.checkpoint.directory.npy_header import Header, read_header
from squish_nf4.checkpoint.directory.npy_reader import open_npy
from squish_nf4.checkpoint.directory.reader import iter_npy_dir, load_npy_dir
from squish_nf4.checkpoint.loading.load_into import load_into
from tests.support.directories import write_small_dir

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def npy_header(data: bytes) -> None:
    """A header is refused, or means to us what it means to numpy."""
    file = io.BytesIO(data)
    try:
        found = read_header(file.read)
    except ValueError:
        return
    assert file.tell() == found.start <= len(data)
    assert found.dtype.kind in "biufc"
    assert 0 <= found.nbytes < 2**63
    with suppress(ValueError):  # it refuses some that we can read
        assert (found.dtype, found.shape, found.fortran) == numpys_header(data)


def numpys_header(data: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    file = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    if major > 2:
        raise ValueError("numpy has no public function for it")
    shape, fortran, dtype = read(file)
    return dtype, shape, fortran


def npy_file(data: bytes) -> None:
    """A .npy file is refused, or is the array that numpy reads."""
    read_file(data, "x.npy")


def zst_file(data: bytes) -> None:
    """A .npy.zst file is refused, or has as many bytes as its header says."""
    read_file(data, "x.npy.zst")


def read_file(data: bytes, name: str) -> None:
    with folder() as path:
        (path / name).write_bytes(data)
        with refusing(name):
            file = open_npy(path / name)
            array = file.load()
            assert (array.dtype, array.shape, array.nbytes) == (file.dtype, file.shape, file.header.nbytes)
            assert array.flags.c_contiguous
            assert array.flags.aligned
            if not file.compressed:
                assert_numpy_agrees(data, file.header, array)


@contextmanager
def refusing(*names: str) -> Iterator[None]:
    """What runs inside may raise ValueError with a text that holds one of names."""
    try:
        yield
    except ValueError as error:
        if not any(name in str(error) for name in names):
            raise


def assert_numpy_agrees(data: bytes, header: Header, array: np.ndarray) -> None:
    with suppress(ValueError):
        expected = np.load(io.BytesIO(data), allow_pickle=False)
        assert header.nbytes == len(data) - header.start
        np.testing.assert_array_equal(array, expected)


FILES = (
    "manifest.json",
    "squish_nf4.json",
    "tensors/.manifest_ready",
    "tensors/a__weight__nf4.npy",
    "tensors/a__weight__s_nf4.npy",
    "tensors/a__weight__shape.npy",
    "tensors/a__bias__pt.npy",
    "tensors/ids__pt.npy",
)
NAMES = (
    b"a__weight",
    b"a__bias",
    b"ids",
    b"tied_to",
    b"kind",
    b"nf4",
    b"kept",
    b"../",
    b'"',
    b"\\u0000",
    b"[",
    b"1e999",
    b"int8",
    b"quint8",
    b"bits8",
    b"float8_e5m2",
)
SIDECAR = (
    b'{"format_version": 1, "tensors": {"a.weight": {"kind": "nf4", "group_size": 8, "source_dtype": "bfloat16"}, '
    b'"a.bias": {"source_dtype": "float16"}, "ids": {"source_dtype": "int64"}}}'
)


class Model(torch.nn.Module):
    """What the directory's tensors fit into."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Module()
        self.a.weight = torch.nn.Parameter(torch.zeros(2, 3, 32, dtype=torch.bfloat16))
        self.a.bias = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("ids", torch.zeros(1, 4, dtype=torch.int64))


def directory(data: bytes) -> None:
    """A directory with anything done to its files is refused by name, or read; and the commands keep their word."""
    with folder() as path:
        sound, edited = write_small_dir(path / "sound"), write_small_dir(path / "edited")
        (edited / "squish_nf4.json").write_bytes(SIDECAR)
        for edit in edits(data):
            edit(edited)
        check_directory(sound, edited)


def edits(data: bytes) -> Iterator[Callable[[Path], None]]:
    """Bytes as edits of five bytes each: what to do, to which file, where, and with what."""
    for start in range(0, min(len(data), 100) - 4, 5):
        kind, which, place, value = data[start], data[start + 1], data[start + 2] * 8 + data[start + 3], data[start + 4]
        yield make_edit(kind % 9, FILES[which % len(FILES)], place, value)


def make_edit(kind: int, name: str, place: int, value: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = find(path, name)
        raw = contents(file)
        at = place % max(1, len(raw))
        changed = {
            1: raw[:at],
            2: raw + bytes([value]) * (place % 300),
            3: raw[:at] + bytes([value]) + raw[at + 1 :],
            4: raw[:at] + NAMES[value % len(NAMES)] + raw[at:],
            5: contents(find(path, FILES[value % len(FILES)])),
            6: raw[:at] + raw[at + 1 + value % 16 :],
        }
        file.unlink(missing_ok=True)  # first: it may be a link to another file
        if kind in changed:
            file.write_bytes(changed[kind])
        elif kind == 7:
            file.symlink_to(Path("../../sound") / name if value % 2 else path / FILES[value % len(FILES)])
        elif kind == 8:
            file.with_name(f"{file.name}.zst").write_bytes(zstandard.compress(raw))

    return edit


def find(path: Path, name: str) -> Path:
    """The file, or its compressed form if that alone is there."""
    file, compressed = path / name, path / f"{name}.zst"
    return compressed if os.path.lexists(compressed) and not os.path.lexists(file) else file


def contents(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def check_directory(sound: Path, edited: Path) -> None:
    with refusing("/edited", "tensor ", "load_into: "):
        load_into(Model(), edited, strict=False)
    with refusing("/edited", "tensor "):
        load_npy_dir(edited, "source")
    tensors: dict[str, torch.Tensor] | None = None
    with refusing("/edited", "tensor "):
        tensors = load_npy_dir(edited, torch.float64)
    report = verify(edited)
    if tensors is None:
        assert not report.sound, "load_npy_dir refuses it"
        for look in (
            lambda: dict(iter_npy_dir(edited, torch.float64)),
            lambda: inspect(edited),
            lambda: diff(sound, edited),
        ):
            with refusing("/edited", "tensor "):
                look()
        return
    assert [(name, t.shape) for name, t in iter_npy_dir(edited, torch.float64)] == [
        (name, t.shape) for name, t in tensors.items()
    ]
    assert [tensor.shape for tensor in inspect(edited).tensors] == [tuple(tensor.shape) for tensor in tensors.values()]
    assert diff(edited, edited).same
    diff(sound, edited)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        yield path
    finally:
        shutil.rmtree(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "npy_header": npy_header,
    "npy_file": npy_file,
    "zst_file": zst_file,
    "directory": directory,
}
