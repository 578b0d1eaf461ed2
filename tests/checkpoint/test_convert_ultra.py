"""--ultra: the bytes of --nf4, with scales and kept tensors compressed where that makes them smaller."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.npy_writer import NpyWriter
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from tests.support.directories import gaussian, save_shard

NOISE = torch.randint(-(2**62), 2**62, (4000,), generator=torch.Generator().manual_seed(1))
TENSORS = {
    "w": gaussian(300, 512, dtype=torch.bfloat16),
    "norm": torch.ones(512),
    "noise": NOISE,
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "spiky": torch.cat([gaussian(400, 300), torch.eye(1, 300) * 1e5]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shard(tmp_path_factory.mktemp("source") / "x.safetensors", TENSORS)


def test_every_file_is_the_plain_one_or_a_smaller_frame_of_the_same_bytes(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "ultra", ultra=True)
    plain = convert(source, tmp_path / "plain")
    compressed = 0
    for file in sorted((tmp_path / "plain" / "tensors").glob("*.npy")):
        same = tmp_path / "ultra" / "tensors" / file.name
        frame = same.with_name(f"{file.name}.zst")
        assert same.exists() != frame.exists()
        if same.exists():
            assert same.read_bytes() == file.read_bytes()
        else:
            assert not file.name.endswith(("__nf4.npy", "__shape.npy"))
            assert frame.stat().st_size < file.stat().st_size
            assert zstandard.ZstdDecompressor().decompress(frame.read_bytes()) == file.read_bytes()
            compressed += 1
    assert compressed >= 3
    assert (tmp_path / "ultra" / "tensors" / "noise__pt.npy").exists(), "noise does not become smaller"
    assert report.bytes_saved == plain.bytes_out - report.bytes_out > 0
    assert plain.bytes_saved == 0
    for ours, theirs in zip(report.tensors, plain.tensors, strict=True):
        assert (ours.name, ours.kind, ours.relative_error) == (theirs.name, theirs.kind, theirs.relative_error)
        assert ours.bits_per_weight == theirs.bits_per_weight


def test_it_is_read_as_the_plain_one_is(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ultra", ultra=True)
    convert(source, tmp_path / "plain")
    ultra, plain = load_npy_dir(tmp_path / "ultra", "source"), load_npy_dir(tmp_path / "plain", "source")
    assert list(ultra) == list(plain)
    assert all(torch.equal(ultra[name], plain[name]) for name in plain)


def test_the_sidecar_records_the_size_before_compression(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", ultra=True)
    records = json.loads((tmp_path / "out" / "squish_nf4.json").read_text())["tensors"]
    scales = records["w"]["files"]["w__s_nf4.npy.zst"]
    assert scales["plain_bytes"] == 128 + 300 * 16 * 4 > scales["bytes"]
    assert "plain_bytes" not in records["w"]["files"]["w__nf4.npy"]


def test_a_frame_says_its_size_and_holds_a_checksum(source: Path, tmp_path: Path) -> None:
    """So that a reader can refuse it before it allocates."""
    convert(source, tmp_path / "out", ultra=True)
    for file in (tmp_path / "out" / "tensors").glob("*.zst"):
        frame = zstandard.get_frame_parameters(file.read_bytes())
        assert frame.content_size == len(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
        assert frame.has_checksum


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.array(1.5, dtype=np.float16),
        np.zeros((0, 3), dtype=np.int64),
        np.array([True, False]),
        np.array([1 + 2j], dtype=np.complex64),
        np.arange(6, dtype=np.uint64).reshape(1, 2, 3),
        np.zeros((1,) * 30),
    ],
    ids=lambda array: f"{array.dtype}{array.shape[:3]}",
)
def test_a_file_written_in_parts_is_the_one_that_numpy_saves(
    tmp_path: Path, array: np.ndarray, compressed: bool
) -> None:
    writer = NpyWriter(tmp_path / "part", "x.npy", array.dtype, array.shape, compressed=compressed)
    for part in np.array_split(array.reshape(-1), 3):
        writer.write(part)
    stored = writer.finish()
    writer.sync()
    expected = io.BytesIO()
    np.save(expected, array)
    written = (tmp_path / "part").read_bytes()
    assert stored.nbytes == len(written)
    assert stored.plain_nbytes == len(expected.getvalue())
    assert (zstandard.ZstdDecompressor().decompress(written) if compressed else written) == expected.getvalue()


def test_a_missing_zstandard_is_named_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match="ultra compresses; for that, type: pip install zstandard"):
        convert(source, tmp_path / "out", ultra=True)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
