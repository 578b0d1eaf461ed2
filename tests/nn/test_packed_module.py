"""PackedModule by itself: what it knows of packed bytes holds for modules that are no linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squish_nf4
from squish_nf4.layout import padded_columns
from squish_nf4.nn.packed import PackedModule, PackedWeight, quantize_padded


class Convolution(PackedModule, nn.Conv1d):
    """Its dense weight has three dimensions: (out, in, kernel)."""

    def __init__(self, dense: nn.Conv1d, group_size: int) -> None:
        nn.Module.__init__(self)
        self.shape = tuple(dense.weight.shape)
        self.group_size = group_size
        self.dense_dtype = dense.weight.dtype
        packed, scales = quantize_padded("Convolution: weight", dense.weight.flatten(1), group_size)
        self.weight = PackedWeight(packed, False)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))

    def _dense_shape(self) -> tuple[int, ...]:
        return self.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, decoded(self), self.bias)


class Lookup(PackedModule):
    """Neither a bias nor a dense module of torch below it."""

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__()
        self.rows, self.columns, self.group_size, self.dense_dtype = rows, columns, group_size, torch.float32
        stored = padded_columns(columns, group_size)
        self.weight = PackedWeight(torch.zeros(rows, stored // 2, dtype=torch.uint8), False)
        self.register_buffer("scales", torch.ones(rows, stored // group_size))

    def _dense_shape(self) -> tuple[int, ...]:
        return self.rows, self.columns


def decoded(module: PackedModule) -> Tensor:
    rows, *others = module._dense_shape()
    dense = squish_nf4.dequantize_nf4(module.weight, module.scales, module.group_size)
    return dense[:, : torch.Size(others).numel()].reshape(rows, *others)


def bytes_of(module: PackedModule) -> tuple[bytes, bytes]:
    return module.weight.detach().numpy().tobytes(), module.scales.numpy().tobytes()


def test_a_cast_changes_what_is_not_packed() -> None:
    module = Convolution(nn.Conv1d(5, 4, 3), 4)
    before = bytes_of(module)
    model = nn.Sequential(module).half()
    assert bytes_of(module) == before
    assert isinstance(module.weight, PackedWeight)
    assert (module.bias.dtype, module.dense_dtype) == (torch.float16, torch.float16)
    assert bytes_of(copy.deepcopy(model)[0]) == before  # type: ignore[arg-type]


def test_a_dense_state_of_any_rank_is_quantized() -> None:
    dense = nn.Conv1d(5, 4, 3)
    module = Convolution(nn.Conv1d(5, 4, 3), 4)
    module.load_state_dict(dense.state_dict())
    packed, scales = squish_nf4.quantize_nf4(F.pad(dense.weight.detach().flatten(1), (0, 1)), 4)
    assert torch.equal(module.weight, packed)
    assert torch.equal(module.scales, scales)
    assert torch.equal(module.bias, dense.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 9)
    assert torch.equal(module(x), F.conv1d(x, decoded(module), dense.bias))


def test_a_packed_state_comes_back_to_the_bit_without_a_bias() -> None:
    saved, loaded = Lookup(6, 10, 4), Lookup(6, 10, 4)
    saved.load_state_dict({"weight": torch.randn(6, 10)})
    loaded.load_state_dict(saved.state_dict())
    assert bytes_of(loaded) == bytes_of(saved)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (11, "Lookup 'rows': the state holds weights beyond column 10, where this layer's padding is"),
        (14, r"Lookup 'rows': packed weight \(6, 8\) and scales \(6, 4\) do not fit; \(6, 6\) and \(6, 3\) are wanted"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_modules_own_name(columns: int, sentence: str) -> None:
    wide = Lookup(6, columns, 4)
    wide.load_state_dict({"weight": torch.ones(6, columns)})
    model = nn.ModuleDict({"rows": Lookup(6, 10, 4)})
    before = bytes_of(model["rows"])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=sentence):
        model.load_state_dict({f"rows.{name}": value for name, value in wide.state_dict().items()})
    assert bytes_of(model["rows"]) == before  # type: ignore[arg-type]
