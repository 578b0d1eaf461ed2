"""Reading the squish directory: our own and other writers'. What is unfit to read: test_damaged_directories.py."""

from __future__ import annotations

import json
import resource
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from squish_nf4.checkpoint.audit.verify import verify
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.reader import iter_npy_dir, load_npy_dir
from tests.support.directories import (
    DECODED,
    MANIFEST,
    allocating_at_most,
    compress,
    header,
    npy,
    write_foreign_dir,
    write_small_dir,
)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_small_dir(tmp_path / "dir")


def test_a_directory_without_our_sidecar_is_read(foreign):
    tensors = load_npy_dir(foreign)
    assert list(tensors) == ["a.weight", "a.bias", "ids"]
    np.testing.assert_array_equal(tensors["a.weight"].numpy(), DECODED)
    torch.testing.assert_close(tensors["a.bias"], torch.tensor([1, 2.5, -0.0]), rtol=0, atol=0)
    assert tensors["a.bias"].signbit().tolist() == [False, False, True]
    torch.testing.assert_close(tensors["ids"], torch.arange(4).reshape(1, 4))


def test_paths_may_be_strings_and_tensors_come_one_by_one(foreign):
    names = iter_npy_dir(str(foreign))
    assert next(names)[0] == "a.weight"
    (foreign / "tensors" / "ids__pt.npy").unlink()
    assert next(names)[0] == "a.bias"
    with pytest.raises(ValueError, match="'ids'"):
        next(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floats_come_in_the_dtype_asked_for_and_integers_in_their_own(foreign, dtype):
    tensors = load_npy_dir(foreign, dtype)
    assert [tensor.dtype for tensor in tensors.values()] == [dtype, dtype, torch.int64]
    torch.testing.assert_close(tensors["a.weight"], torch.from_numpy(DECODED).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, "float32", 3, torch.bool, torch.complex64])
def test_a_dtype_that_is_not_floating_is_refused(foreign, dtype):
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        load_npy_dir(foreign, dtype)


def test_the_source_dtype_needs_our_sidecar(foreign):
    with pytest.raises(ValueError, match=r"has no squish_nf4.json, so dtype=\"source\" is unknown"):
        load_npy_dir(foreign, "source")


@pytest.mark.parametrize(
    "sidecar",
    [
        {"tensors": {}},
        {"tensors": {"a.weight": {"source_dtype": "nn"}}},
        {"tensors": {"a.weight": {"source_dtype": 1}}},
    ],
)
def test_a_sidecar_that_does_not_say_the_source_dtype_is_refused_by_name(foreign, sidecar):
    (foreign / "squish_nf4.json").write_text(json.dumps(sidecar))
    assert len(load_npy_dir(foreign)) == 3
    with pytest.raises(ValueError, match=r"does not say which dtype 'a.weight' had"):
        load_npy_dir(foreign, "source")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[
            ("a.weight", dtype)
            for dtype in ("int8", "bool", "bits8", "int4", "float4_e2m1fn_x2", "quint8", "complex64")
        ],
        ("a.bias", "int64"),
        ("ids", "int32"),
        ("ids", "float32"),
    ],
)
def test_a_source_dtype_that_cannot_have_become_what_is_stored_is_refused_by_name(foreign, name, dtype):
    records = {"a.weight": "bfloat16", "a.bias": "float64", "ids": "int64"}
    write_sidecar(foreign, records)
    assert [str(tensor.dtype) for tensor in load_npy_dir(foreign, "source").values()] == [
        "torch.bfloat16",
        "torch.float64",
        "torch.int64",
    ]
    assert verify(foreign).sound
    write_sidecar(foreign, records | {name: dtype})
    with pytest.raises(ValueError, match=f"squish_nf4.json records that '{name}' was {dtype}, and it is stored as"):
        load_npy_dir(foreign, "source")
    [problem] = verify(foreign).problems
    assert f"records that '{name}' was {dtype}" in problem


def write_sidecar(path, dtypes):
    tensors = {name: {"source_dtype": dtype} for name, dtype in dtypes.items()}
    (path / "squish_nf4.json").write_text(json.dumps({"tensors": tensors}))


def test_compressed_files_are_read_like_plain_ones(foreign):
    for file in sorted((foreign / "tensors").glob("*.npy")):
        compress(file)
    tensors = load_npy_dir(foreign)
    np.testing.assert_array_equal(tensors["a.weight"].numpy(), DECODED)
    assert tensors["ids"].tolist() == [[0, 1, 2, 3]]


def test_a_file_compressed_in_several_frames_is_read(foreign):
    file = foreign / "tensors" / "ids__pt.npy"
    raw, compressor = file.read_bytes(), zstandard.ZstdCompressor()
    file.with_name("ids__pt.npy.zst").write_bytes(
        b"".join(compressor.compress(raw[i : i + 40]) for i in range(0, len(raw), 40))
    )
    file.unlink()
    assert load_npy_dir(foreign)["ids"].tolist() == [[0, 1, 2, 3]]


def test_a_missing_zstandard_is_named_with_what_to_type(foreign, monkeypatch):
    compress(foreign / "tensors" / "ids__pt.npy")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"ids__pt.npy.zst is compressed; to read it, type: pip install zstandard"):
        load_npy_dir(foreign)


def test_zstandard_is_not_imported_for_plain_files(foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert len(load_npy_dir(foreign)) == 3


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1.5, -2.0], [3.0, 4.0]], dtype=">f4"),
        np.array([[1.5, -2.0], [3.0, 4.0]], dtype=np.float32, order="F"),
        np.array(2.5),
        np.zeros((0, 4), dtype=np.float32),
        np.array([True, False]),
        np.array([2**64 - 1], dtype=np.uint64),
        np.array([1 + 2j], dtype=np.complex64),
    ],
    ids=["big-endian", "fortran", "0-d", "empty", "bool", "uint64", "complex"],
)
def test_arrays_of_any_layout_are_read(tmp_path, array):
    path = write_foreign_dir(tmp_path / "dir", {"x__pt": array}, {"x": "x"})
    [tensor] = load_npy_dir(path).values()
    assert tensor.is_contiguous()
    assert tensor.shape == array.shape
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_negative_scales_are_decoded(tmp_path):
    packed, scales = np.array([[0x0F, 0x70]], dtype=np.uint8), np.array([[-2.0, -0.5]], dtype=np.float32)
    path = write_foreign_dir(tmp_path / "dir", {"x__nf4": packed, "x__s_nf4": scales}, {"x": "x"})
    assert load_npy_dir(path)["x"].tolist() == [[-2.0, 2.0, 0.5, 0.0]]


def test_names_may_be_mapped_to_any_safe_key(foreign):
    (foreign / "manifest.json").write_text(json.dumps({"another/name": "ids"}))
    assert list(load_npy_dir(foreign)) == ["another/name"]


def test_float64_that_float32_cannot_hold_is_refused_and_not_made_infinite(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1e300, 1.0], dtype=torch.float64)}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="tensor 'big': holds values that float32 cannot; read it with dtype='source'"):
        load_npy_dir(tmp_path / "out")
    assert load_npy_dir(tmp_path / "out", dtype="source")["big"].tolist() == [1e300, 1.0]


def test_values_that_a_narrower_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    arrays = {
        "kept__pt": np.array([1e6, 1], dtype=np.float32),
        "nf4__nf4": np.array([[0x0F]], dtype=np.uint8),
        "nf4__s_nf4": np.array([[1e6]], dtype=np.float32),
    }
    for name in ("kept", "nf4"):
        path = write_foreign_dir(tmp_path / name, arrays, {name: name})
        assert load_npy_dir(path)[name].abs().max() == 1e6
        assert load_npy_dir(path, torch.bfloat16)[name].isfinite().all()
        with pytest.raises(ValueError, match=f"tensor '{name}': holds values that float16 cannot"):
            load_npy_dir(path, torch.float16)


def test_infinity_and_nan_stay_what_they_are(tmp_path: Path) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 1], dtype=np.float32)
    path = write_foreign_dir(tmp_path / "dir", {"x__pt": values}, {"x": "x"})
    np.testing.assert_array_equal(load_npy_dir(path, torch.float16)["x"].float().numpy(), values)


def test_arrays_that_do_not_lie_aligned_are_read(tmp_path: Path) -> None:
    """Another writer's header may have any length: float32 values may begin at an odd byte."""
    path = write_foreign_dir(tmp_path / "dir", {}, {"x": "x"})
    for spaces in range(4):
        values = np.arange(5, dtype=np.float32)
        (path / "tensors" / "x__pt.npy").write_bytes(npy(header("<f4", "(5,)") + " " * spaces, values.tobytes()))
        [tensor] = load_npy_dir(path).values()
        assert tensor.data_ptr() % 4 == 0
        assert tensor.tolist() == values.tolist()


def test_a_kept_tensor_is_mapped_and_writing_to_it_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_foreign_dir(tmp_path / "dir", {"x__pt": np.ones(2**20, np.float32)}, {"x": "x"})
    before = (path / "tensors" / "x__pt.npy").read_bytes()
    with allocating_at_most(2**18):
        [tensor] = load_npy_dir(path).values()
    tensor += 1
    assert tensor.sum() == 2**21
    assert (path / "tensors" / "x__pt.npy").read_bytes() == before
    (path / "tensors" / "x__pt.npy").unlink()
    assert tensor.sum() == 2**21


def test_more_arrays_are_mapped_than_files_may_be_open(tmp_path: Path) -> None:
    """A 70B Llama has 1120 arrays, and 1024 open files are the usual limit."""
    names = [f"x{i}" for i in range(100)]
    path = write_foreign_dir(
        tmp_path / "dir", {f"{name}__pt": np.full(3, 7, np.float32) for name in names}, {name: name for name in names}
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (path / "manifest.json").open() as newest:  # descriptors are given from the lowest on
        resource.setrlimit(resource.RLIMIT_NOFILE, (newest.fileno() + 20, limits[1]))
    try:
        tensors = load_npy_dir(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(tensor.tolist() == [7, 7, 7] for tensor in tensors.values())


def test_arrays_are_mapped_on_the_cpu_whatever_torchs_default_device(tmp_path: Path) -> None:
    path = write_foreign_dir(tmp_path / "dir", {"x__pt": np.ones(3, np.float32)}, {"x": "x"})
    with torch.device("meta"), torch.inference_mode():
        assert load_npy_dir(path)["x"].tolist() == [1, 1, 1]


def test_a_file_that_cannot_be_mapped_is_named(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(ValueError, match=r"a__weight__shape.npy cannot be read: unable to mmap"):
        load_npy_dir(foreign)


def tied(path: Path, manifest: dict[str, str], records: dict[str, object] | None = None) -> Path:
    arrays = {"x__pt": np.ones((2, 4), np.float32), "y__pt": np.zeros(3)}
    write_foreign_dir(path, arrays, manifest)
    if records is not None:
        (path / "squish_nf4.json").write_text(json.dumps({"tensors": records}))
    return path


@pytest.mark.parametrize(
    ("manifest", "records"),
    [
        ({"x": "x", "head": "x", "y": "y"}, None),
        ({"x": "x", "head": "x", "y": "y"}, {"x": {}, "head": {"tied_to": "x"}, "y": {}}),
        ({"head": "x", "x": "x", "y": "y"}, {"x": {}, "head": {"tied_to": "x"}, "y": {}}),
        ({"x": "x", "a": "x", "head": "x", "y": "y"}, {"a": {"tied_to": "x"}, "head": {"tied_to": "x"}}),
    ],
    ids=["without a sidecar", "with one", "in another order", "three"],
)
def test_tied_tensors_are_one_tensor(
    tmp_path: Path, manifest: dict[str, str], records: dict[str, object] | None
) -> None:
    path = tied(tmp_path / "dir", manifest, records)
    for tensors in (load_npy_dir(path), dict(iter_npy_dir(path))):
        assert list(tensors) == list(manifest)
        assert tensors["head"] is tensors["x"]
        assert tensors["y"] is not tensors["x"]


def test_the_iterator_holds_an_owner_only_while_a_tied_name_is_to_come(tmp_path: Path) -> None:
    path = tied(tmp_path / "dir", {"x": "x", "head": "x", "y": "y"})
    tensors = iter_npy_dir(path)
    held = [weakref.ref(next(tensors)[1])]
    assert held[0]() is not None  # for the next name
    held.append(weakref.ref(next(tensors)[1]))
    next(tensors)
    assert [reference() for reference in held] == [None, None]


def test_a_tied_tensor_takes_the_source_dtype_of_its_owner(tmp_path: Path) -> None:
    records = {"x": {"source_dtype": "bfloat16"}, "head": {"tied_to": "x"}, "y": {"source_dtype": "float64"}}
    tensors = load_npy_dir(tied(tmp_path / "dir", {"x": "x", "head": "x", "y": "y"}, records), "source")
    assert [tensor.dtype for tensor in tensors.values()] == [torch.bfloat16, torch.bfloat16, torch.float64]
    assert tensors["head"] is tensors["x"]


def test_a_directory_may_be_reached_through_a_link_and_hold_links_inside(foreign: Path) -> None:
    (foreign / "blobs").mkdir()
    for file in sorted((foreign / "tensors").glob("*.npy")):
        file.rename(foreign / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    (foreign.parent / "link").symlink_to(foreign)
    assert load_npy_dir(foreign.parent / "link").keys() == MANIFEST.keys()
