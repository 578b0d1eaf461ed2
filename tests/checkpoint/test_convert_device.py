"""convert on a GPU: refused where there is none; elsewhere the same bytes. Here the CPU stands for the GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import squish_nf4
from squish_nf4 import _build_info
from squish_nf4.checkpoint.conversion import convert as conversion
from squish_nf4.checkpoint.conversion import devices, encode
from squish_nf4.checkpoint.conversion.convert import UnfinishedError
from tests.support.directories import contents, gaussian, is_finished, save_shard
from tests.support.processes import assert_one_sentence, squish

GPU = torch.device("cuda")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    spiky = gaussian(70, 600, dtype=torch.bfloat16)
    spiky[41, 5] = 900
    tensors = {
        "a.weight": gaussian(300, 512),
        "b.weight": gaussian(3, 40, 96, dtype=torch.bfloat16, seed=8),
        "c.weight": gaussian(64, 64, dtype=torch.float64, seed=9),
        "d.weight": gaussian(64, 64, seed=10).to(torch.float8_e4m3fn),
        "e.weight": gaussian(5, 65_600, dtype=torch.float16, seed=11),  # rows longer than a block
        "spiky.weight": spiky,
        "norm.weight": gaussian(64),
    }
    save_shard(tmp_path / "model" / "model.safetensors", tensors)
    return tmp_path / "model"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A GPU that is the CPU: the shapes of what was moved there."""
    shapes: list[tuple[int, ...]] = []

    def moved(values: Tensor, device: torch.device) -> Tensor:
        assert device == GPU
        shapes.append(tuple(values.shape))
        return values.clone()

    monkeypatch.setattr(encode, "moved", moved)
    monkeypatch.setattr(conversion, "device_named", torch.device)
    return shapes


@pytest.mark.parametrize("max_ram", [2**26, 2**30])
@pytest.mark.parametrize("options", [{}, {"outlier_threshold": math.inf, "group_size": 64}], ids=["kept", "all"])
def test_the_bytes_are_those_of_the_cpu(
    source: Path, tmp_path: Path, played: list[tuple[int, ...]], max_ram: int, options: dict[str, float]
) -> None:
    squish_nf4.convert(source, tmp_path / "cpu", **options)
    assert played == []
    report = squish_nf4.convert(source, tmp_path / "gpu", device="cuda", max_ram=max_ram, **options)
    assert len(played) >= 6
    assert any(rows > 64 and columns == 512 for rows, columns in played)  # at once, though a CPU takes it in blocks
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
    plan = squish_nf4.dry_run(source, device="cuda", **options)
    assert [planned.group_size for planned in plan.tensors] == [tensor.group_size for tensor in report.tensors]


def test_a_weight_that_is_not_finite_is_named_with_its_place(tmp_path: Path, played: list[tuple[int, ...]]) -> None:
    w = gaussian(200, 512)
    w[150, 7] = math.nan
    save_shard(tmp_path / "model.safetensors", {"w": w})
    with pytest.raises(ValueError, match="tensor 'w': row 150, column 7 is nan"):
        squish_nf4.convert(tmp_path / "model.safetensors", tmp_path / "out", device="cuda")
    assert played


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot."), "the memory of cuda is full"),
        (torch.AcceleratorError("CUDA error: it broke\nCompile with ..."), "cuda fails: CUDA error: it broke"),
    ],
    ids=["memory", "failure"],
)
def test_a_gpu_that_fails_stops_it_and_resume_goes_on_with_the_cpu(
    source: Path,
    tmp_path: Path,
    played: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    said: str,
) -> None:
    def failing(values: Tensor, device: torch.device) -> Tensor:
        if values.dtype == torch.float64:
            raise error
        return values

    monkeypatch.setattr(encode, "moved", failing)
    with pytest.raises(UnfinishedError, match=rf"{said}.*resume goes on with it"):
        squish_nf4.convert(source, tmp_path / "out", device="cuda")
    assert not is_finished(tmp_path / "out")
    squish_nf4.convert(source, tmp_path / "out", resume=True)
    squish_nf4.convert(source, tmp_path / "cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "", 3.5, 2**70, "cuda:x", "cuda:-1", "cpu:3", "cuda:1234"])
def test_what_is_no_device_of_ours_is_named(device: object, tmp_path: Path) -> None:
    for function in (squish_nf4.dry_run, lambda src, **named: squish_nf4.convert(src, tmp_path / "out", **named)):
        with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got"):
            function(tmp_path, device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("built_for", "gpus", "device", "sentence"),
    [
        (None, 1, "cuda", "device is cuda, but squish_nf4 was built for the CPU only"),
        ("13.0", 0, "cuda", "device is cuda, but torch finds no GPU"),
        ("13.0", 1, "cuda:1", "device is cuda:1, but torch finds 1 GPU, numbered from 0"),
        ("13.0", 2, "cuda:4", "device is cuda:4, but torch finds 2 GPUs, numbered from 0"),
        ("13.0", 2, "cuda:256", "device is cuda:256, but torch finds 2 GPUs, numbered from 0"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(
    built_for: str | None, gpus: int, device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build_info, "CUDA_VERSION", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=sentence):
        devices.device_named(device)


def test_a_gpu_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "CUDA_VERSION", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    named = [str(devices.device_named(name)) for name in ("cuda", "cuda:1", GPU, "cpu", torch.device("cpu"))]
    assert named == ["cuda:2", "cuda:1", "cuda:2", "cpu", "cpu"]  # the current one is that of the caller's thread


def test_the_command_says_it_in_one_sentence(source: Path, tmp_path: Path) -> None:
    done = squish("convert", "--nf4", "--device", "tpu", source, tmp_path / "out")
    assert_one_sentence(done, "device must be cpu, cuda or cuda:N, got 'tpu'")
