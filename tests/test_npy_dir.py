"""Reading the squish directory: our own and other writers', and every way in which one can be unfit to read."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from squish_nf4.checkpoint.convert import convert
from squish_nf4.checkpoint.npy_dir import iter_npy_dir, load_npy_dir
from tests import reference
from tests.checkpoint_files import write_foreign_dir

PACKED, SCALES = reference.quantize(np.random.default_rng(5).standard_normal((6, 32), dtype=np.float32), 8)
DECODED = reference.dequantize(PACKED, SCALES, 8).reshape(2, 3, 32)


@pytest.fixture
def foreign(tmp_path):
    """A directory by another program: one tensor in NF4 (group size 8), and kept ones of several kinds."""
    arrays = {
        "a__weight__nf4": PACKED,
        "a__weight__s_nf4": SCALES,
        "a__weight__shape": np.array([2, 3, 32]),
        "a__bias__pt": np.array([1, 2.5, -0.0], dtype=np.float16),
        "a__bias__shape": np.array([3]),
        "ids__pt": np.arange(4).reshape(1, 4),
    }
    return write_foreign_dir(tmp_path / "dir", arrays, {"a.weight": "a__weight", "a.bias": "a__bias", "ids": "ids"})


def compress(file):
    file.with_name(f"{file.name}.zst").write_bytes(zstandard.ZstdCompressor().compress(file.read_bytes()))
    file.unlink()


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
        {},
        {"tensors": {}},
        {"tensors": []},
        {"tensors": {"a.weight": {"source_dtype": "nn"}}},
        {"tensors": {"a.weight": {"source_dtype": 1}}},
    ],
)
def test_a_sidecar_that_does_not_say_the_source_dtype_is_refused_by_name(foreign, sidecar):
    (foreign / "squish_nf4.json").write_text(json.dumps(sidecar))
    assert len(load_npy_dir(foreign)) == 3
    with pytest.raises(ValueError, match=r"does not say which dtype 'a.weight' had"):
        load_npy_dir(foreign, "source")


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


def test_an_unfinished_directory_is_refused(foreign):
    (foreign / "tensors" / ".manifest_ready").unlink()
    with pytest.raises(ValueError, match=r"is not a finished squish directory: it has no tensors/.manifest_ready"):
        load_npy_dir(foreign)


def test_a_missing_directory_or_a_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        load_npy_dir(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is not a directory"):
        load_npy_dir(tmp_path / "file")


@pytest.mark.parametrize("suffix", ["__pt_df11.npy", "__pt_df11.npy.zst"])
def test_another_writers_pickle_is_refused_by_name_and_never_opened(foreign, monkeypatch, suffix):
    def explode(*_):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "loads", explode)
    (foreign / "tensors" / f"a__bias{suffix}").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=f"tensor 'a.bias': a__bias{suffix} is a pickle of another program"):
        load_npy_dir(foreign)


def test_an_object_array_is_refused(foreign):
    np.save(foreign / "tensors" / "ids__pt.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"ids__pt.npy cannot be read: Object arrays cannot be loaded"):
        load_npy_dir(foreign)


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.zeros(2, dtype="V2"), np.zeros(2, dtype="M8[s]")], ids=["text", "void", "time"]
)
def test_an_array_without_numbers_is_refused(foreign, array):
    np.save(foreign / "tensors" / "ids__pt.npy", array)
    with pytest.raises(ValueError, match=r"ids__pt.npy holds .*, which is no number type"):
        load_npy_dir(foreign)


def test_a_float_that_torch_lacks_is_refused(foreign):
    np.save(foreign / "tensors" / "ids__pt.npy", np.zeros(2, dtype=np.longdouble))
    with pytest.raises(ValueError, match=r"tensor 'ids': torch has no float128"):
        load_npy_dir(foreign)


def replace(stem, array):
    return lambda folder: np.save(folder / f"{stem}.npy", array)


def remove(stem):
    return lambda folder: (folder / f"{stem}.npy").unlink()


DAMAGE = {
    "scales missing": (remove("a__weight__s_nf4"), r"found: __nf4.npy, __shape.npy"),
    "packed missing": (remove("a__weight__nf4"), r"found: __s_nf4.npy, __shape.npy"),
    "stored in two forms": (
        replace("a__weight__pt", np.ones(4)),
        "found: __nf4.npy, __pt.npy, __s_nf4.npy, __shape.npy",
    ),
    "stored twice": (
        lambda f: (f / "a__weight__nf4.npy.zst").touch(),
        "a__weight__nf4.npy is there twice, plain and as .zst",
    ),
    "packed of int8": (
        replace("a__weight__nf4", np.zeros((6, 16), np.int8)),
        "must be uint8 and __s_nf4 float32, got int8 and float32",
    ),
    "scales of float64": (replace("a__weight__s_nf4", np.zeros((6, 4))), "got uint8 and float64"),
    "packed 1-D": (
        replace("a__weight__nf4", np.zeros(96, np.uint8)),
        r"__nf4 \(96,\) and __s_nf4 \(6, 4\) do not belong together",
    ),
    "rows differ": (replace("a__weight__s_nf4", np.zeros((5, 4), np.float32)), "do not belong together"),
    "no scale": (replace("a__weight__s_nf4", np.zeros((6, 0), np.float32)), "do not belong together"),
    "groups of no size": (replace("a__weight__s_nf4", np.zeros((6, 5), np.float32)), "do not belong together"),
    "too many scales": (replace("a__weight__s_nf4", np.zeros((6, 64), np.float32)), "do not belong together"),
    "another shape": (replace("a__weight__shape", np.array([2, 3, 31])), "is not the shape of 192 values"),
    "a negative shape": (replace("a__weight__shape", np.array([-6, -32])), "is not the shape of 192 values"),
    "a shape of floats": (replace("a__weight__shape", np.array([6.0, 32.0])), "is not the shape of 192 values"),
    "a shape in 2-D": (replace("a__weight__shape", np.array([[6, 32]])), "is not the shape of 192 values"),
    "not an array": (lambda f: (f / "a__weight__nf4.npy").write_bytes(b"hello"), "a__weight__nf4.npy cannot be read"),
    "an empty file": (lambda f: (f / "a__weight__nf4.npy").write_bytes(b""), "a__weight__nf4.npy cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_the_tensor_and_the_cause(foreign, kind):
    damage, text = DAMAGE[kind]
    damage(foreign / "tensors")
    with pytest.raises(ValueError, match=f"tensor 'a.weight': .*{text}"):
        load_npy_dir(foreign)


def test_a_truncated_file_is_refused(foreign):
    file = foreign / "tensors" / "a__weight__nf4.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a__weight__nf4.npy cannot be read"):
        load_npy_dir(foreign)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: b"hello", lambda raw: raw[:20] + b"!" + raw[21:]])
def test_a_damaged_zst_file_is_refused(foreign, damage):
    compress(foreign / "tensors" / "a__weight__nf4.npy")
    file = foreign / "tensors" / "a__weight__nf4.npy.zst"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"a__weight__nf4.npy.zst cannot be read"):
        load_npy_dir(foreign)


def test_the_files_of_other_forms_are_listed_without_those_of_other_tensors(tmp_path):
    arrays = {"a__q": np.ones(1), "a__s": np.ones(1), "a__b__pt": np.ones(1)}
    path = write_foreign_dir(tmp_path / "dir", arrays, {"a": "a", "a.b": "a__b"})
    with pytest.raises(ValueError, match=r"tensor 'a': wanted are .*; found: __q.npy, __s.npy$"):
        load_npy_dir(path)


def test_a_tensor_without_files_is_refused(tmp_path):
    path = write_foreign_dir(tmp_path / "dir", {}, {"a": "a"})
    with pytest.raises(ValueError, match=r"tensor 'a': .*found: nothing$"):
        load_npy_dir(path)


@pytest.mark.parametrize("key", ["../a", "/a", "a/b", "a\\b", "C:a", "", "a\0b", "\ud800"])
def test_a_manifest_key_that_is_no_file_name_is_refused(tmp_path, key):
    path = write_foreign_dir(tmp_path / "dir", {}, {"name": key})
    with pytest.raises(ValueError, match="tensor 'name'"):
        load_npy_dir(path)


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ("", "manifest.json cannot be read"),
        ("[]", "manifest.json is not a JSON object"),
        ('{"a": 3}', "the key of 'a' is not a string"),
        ('{"a.b": "a__b", "a__b": "a__b"}', "'a.b' and 'a__b' share the key 'a__b'"),
    ],
)
def test_a_damaged_manifest_is_refused(foreign, manifest, text):
    (foreign / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=text):
        load_npy_dir(foreign)


def test_a_missing_manifest_is_refused(foreign):
    (foreign / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        load_npy_dir(foreign)


def test_names_may_be_mapped_to_any_safe_key(foreign):
    (foreign / "manifest.json").write_text(json.dumps({"another/name": "ids"}))
    assert list(load_npy_dir(foreign)) == ["another/name"]


def test_float64_that_float32_cannot_hold_is_refused_and_not_made_infinite(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1e300, 1.0], dtype=torch.float64)}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="tensor 'big': holds values that float32 cannot; read it with dtype='source'"):
        load_npy_dir(tmp_path / "out")
    assert load_npy_dir(tmp_path / "out", dtype="source")["big"].tolist() == [1e300, 1.0]
