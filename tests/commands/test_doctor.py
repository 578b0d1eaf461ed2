"""The doctor: it passes here, it says what it found, and it would notice a library that computes wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from squish_nf4 import _C, _build_info, library_path, ops
from squish_nf4.doctor import examine as doctor
from squish_nf4.doctor import self_test
from tests.support.helpers import require
from tests.support.processes import squish


def failures() -> set[str]:
    return {result.name for result in doctor.examine().results if not result.passed}


def test_self_test_passes_here() -> None:
    findings = doctor.examine()
    assert [result for result in findings.results if not result.passed] == []
    assert findings.healthy
    assert findings.advice == ()
    assert {result.name for result in findings.results} >= set(self_test.ON_CPU)


def test_self_test_passes_on_cuda() -> None:
    require(
        "cuda", bool(_build_info.CUDA_VERSION) and torch.cuda.is_available(), "a CUDA build and a device are wanted"
    )
    on_cuda = [result for result in doctor.examine().results if result.device == "CUDA"]
    assert {result.name for result in on_cuda if result.passed} == set(self_test.ON_CUDA)


def test_facts_name_what_is_in_use() -> None:
    facts = doctor.examine().facts
    assert facts["CPU"]["path in use"] == _C.cpu_isa()
    assert library_path() in facts["library"]["squish_nf4"]
    assert torch.__version__ in facts["library"]["runs in"]
    assert _build_info.COMPILER in facts["library"]["built for"]
    assert (_build_info.CUDA_VERSION or "CPU only") in facts["CUDA"]["built for"]
    assert "safetensors" in facts["packages"]["installed"]


def flip_a_byte(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def broken(w: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
        packed, scales = quantize(w, group_size)
        packed[-1, -1] ^= 1
        return packed, scales

    return broken


def move_a_scale(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def broken(w: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
        packed, scales = quantize(w, group_size)
        scales[0, 0] = torch.nextafter(scales[0, 0], torch.tensor(torch.inf))
        return packed, scales

    return broken


def truncate(dequantize: Callable[..., Any]) -> Callable[..., Any]:
    """Rounds to 16 bits toward zero."""

    def broken(packed: Tensor, scales: Tensor, group_size: int = 32, *, dtype: Any = None) -> Tensor:
        result = dequantize(packed, scales, group_size)
        if dtype == torch.bfloat16:
            return (result.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype)
        return result if dtype is None else result.to(dtype)

    return broken


def lose_a_column(linear: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: Tensor, *args: Any) -> Tensor:
        x = x.clone()
        x[:, -1] = 0
        return linear(x, *args)

    return broken


def forget_the_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, packed, scales, bias, group_size: linear(x, packed, scales, None, group_size)


def cut_the_gradient(linear: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, packed, scales, bias, group_size: linear(2 * x - x.detach(), packed, scales, bias, group_size)


def depend_on_threads(linear: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: linear(*args) * (1 + 1e-6 * torch.get_num_threads())


@pytest.mark.parametrize(
    ("operator", "breaks", "noticed"),
    [
        ("quantize_nf4", flip_a_byte, {"exact weights come back exactly", "every weight takes the nearest level"}),
        ("quantize_nf4", move_a_scale, {"exact weights come back exactly", "every weight takes the nearest level"}),
        ("dequantize_nf4", truncate, {"every weight takes the nearest level"}),
        ("linear_nf4", lose_a_column, {"linear agrees with float64", "gradient agrees with float64"}),
        ("linear_nf4", forget_the_bias, {"linear agrees with float64", "gradient agrees with float64"}),
        ("linear_nf4", cut_the_gradient, {"gradient agrees with float64"}),
        ("linear_nf4", depend_on_threads, {"threads change nothing"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_operator_is_noticed(
    monkeypatch: pytest.MonkeyPatch, operator: str, breaks: Callable[..., Any], noticed: set[str]
) -> None:
    monkeypatch.setattr(ops, operator, breaks(getattr(ops, operator)))
    findings = doctor.examine()
    assert not findings.healthy
    assert {result.name for result in findings.results if not result.passed} == noticed
    assert any("Do not trust" in sentence for sentence in findings.advice)


def test_a_wrong_level_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = list(_C.codebook())
    levels[3] *= 1 + 1e-5
    monkeypatch.setattr(self_test._C, "codebook", lambda: tuple(levels))
    assert "levels are those of NF4" in failures()


def test_an_operator_that_raises_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image\nand more lines")

    monkeypatch.setattr(ops, "linear_nf4", raises)
    details = {result.detail for result in doctor.examine().results if not result.passed}
    assert details == {"RuntimeError: no kernel image"}


def test_command_prints_facts_and_checks() -> None:
    done = squish("doctor", SQUISH_NF4_ISA="scalar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "path in use     scalar" in done.stdout
    assert "SQUISH_NF4_ISA  scalar (caps the path)" in done.stdout
    assert done.stdout.count("  pass  ") == len(doctor.examine().results)
    assert "checks passed." in done.stdout


def test_command_ends_with_1_where_no_path_can_be_chosen() -> None:
    done = squish("doctor", SQUISH_NF4_ISA="sse9")
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert "SQUISH_NF4_ISA must be scalar, avx2, avx512 or avx512_bf16, got 'sse9'" in done.stdout
    assert "Unset SQUISH_NF4_ISA" in done.stdout
    assert done.stderr == ""
