"""The operators on a GPU, and on one that is executed: tests/cuda asks the same of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squish_nf4 import _build_info
from tests.support.cuda_inputs import bits
from tests.support.helpers import require
from tests.support.ptx import host
from tests.support.ptx.memory import Buffer, Memory

OPS = torch.ops.squish


def require_a_gpu() -> None:
    """Skip the test without one, or fail if SQUISH_REQUIRE names cuda."""
    require("cuda", _build_info.CUDA_VERSION is not None, "squish_nf4 was built for the CPU only")
    require("cuda", torch.cuda.is_available(), "torch finds no GPU")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class RealGpu:
    """The operators as they are."""

    def put(self, tensor: Tensor) -> Tensor:
        """On the GPU, with the strides and the place in its storage that it has here."""
        return storage_of(tensor).cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    quantize_nf4 = staticmethod(OPS.quantize_nf4)
    dequantize_nf4 = staticmethod(OPS.dequantize_nf4)
    linear_nf4 = staticmethod(OPS.linear_nf4)
    survey_nf4 = staticmethod(OPS._survey_nf4)

    def dequantize_nf4_out(self, packed: Tensor, scales: Tensor, group_size: int, out: Tensor) -> None:
        OPS.dequantize_nf4.out(packed, scales, group_size, out=out)


class ExecutedGpu:
    """The launchers of csrc/cuda, executed; around them, what csrc/ops does before it launches. Tensors stay here."""

    def __init__(self, library: Path, **gpu: int) -> None:
        self.library = library
        self.gpu = host.Gpu(library, **gpu)

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def quantize_nf4(self, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        w = weight if weight.stride(1) == 1 else weight.contiguous()
        n, d = w.shape
        self.gpu.reset()
        packed, scales = self.gpu.memory.empty(n * d // 2), self.gpu.memory.empty(4 * n * d // group_size)
        launcher = f"quantize_{name_of(w.dtype)}"
        self.gpu.call(launcher, self.upload(w), n, d, w.stride(0), group_size, packed, scales)
        return tensor_of(packed, torch.uint8, n, d // 2), tensor_of(scales, torch.float32, n, d // group_size)

    def dequantize_nf4(
        self, packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        out = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=dtype)
        self.dequantize_nf4_out(packed, scales, group_size, out)
        return out

    def dequantize_nf4_out(self, packed: Tensor, scales: Tensor, group_size: int, out: Tensor) -> None:
        self.gpu.reset()
        skew = out.storage_offset() * out.element_size() % 256
        buffer = self.gpu.memory.empty(out.numel() * out.element_size(), skew)
        given = self.upload(packed.contiguous()), self.upload(scales.contiguous())
        self.gpu.call(f"dequantize_{name_of(out.dtype)}", *given, out.numel(), group_size, buffer)
        out.copy_(tensor_of(buffer, out.dtype, *out.shape))

    def survey_nf4(self, weight: Tensor, packed: Tensor, scales: Tensor, group_size: int) -> Tensor:
        w = weight if weight.stride(1) == 1 else weight.contiguous()
        (n, d), row_bytes = w.shape, packed.shape[1]
        out = self.gpu.reset().empty(32 * n)
        given = self.upload(packed.contiguous()), self.upload(scales.contiguous())
        launcher = f"survey_{name_of(w.dtype)}"
        self.gpu.call(launcher, self.upload(w), n, d, w.stride(0), *given, row_bytes, group_size, out)
        return tensor_of(out, torch.float64, n, 4)

    def linear_nf4(self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
        (m, columns), n, d = x.shape, packed.shape[0], 2 * packed.shape[1]
        if x.stride(1) != 1:
            x = x.contiguous()
        memory, name = self.gpu.reset(), f"linear_{name_of(x.dtype)}"
        y, of_bias = memory.empty(m * n * x.element_size()), None if bias is None else self.upload(bias)
        same = bias is not None and bias.dtype == x.dtype
        given = (
            *(self.upload(x), self.upload(packed.contiguous()), self.upload(scales.contiguous())),
            *(of_bias if same else None, None if same else of_bias, y),
        )
        sizes = m, n, d, columns, x.stride(0), group_size
        if not self.gpu.ask(f"{name}_takes", *given, None, *sizes):
            raise ValueError(f"no kernel takes {m} activations, {packed.shape} packed bytes and groups of {group_size}")
        values = self.gpu.ask(f"{name}_scratch", *given, None, *sizes)
        self.gpu.call(name, *given, memory.empty(values * x.element_size()) if values else None, *sizes)
        return tensor_of(y, x.dtype, m, n)

    def upload(self, tensor: Tensor) -> Buffer | int:
        """The tensor's whole storage; the address of its first element there. What it has no element at is no input."""
        storage = storage_of(tensor)
        used = np.zeros(storage.numel(), bool)
        places = torch.arange(storage.numel()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        used[places.reshape(-1)] = True
        buffer = self.gpu.memory.upload(bits(storage).numpy(), readable=used.repeat(tensor.element_size()))
        return buffer.address + tensor.storage_offset() * tensor.element_size()


Gpu = RealGpu | ExecutedGpu


def storage_of(tensor: Tensor) -> Tensor:
    """All elements of the tensor's storage, in a row."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def tensor_of(buffer: Buffer, dtype: torch.dtype, *shape: int) -> Tensor:
    content = buffer.bytes()
    return torch.from_numpy(content).view(dtype).view(shape) if content.size else torch.empty(shape, dtype=dtype)


def end_of(memory: Memory, tensor: Tensor, elements: int) -> Buffer:
    """An input of so many elements, of which ``tensor`` is the end: nothing else of it is there."""
    size = tensor.element_size()
    return memory.part_of_input(size * elements, size * (elements - tensor.numel()), bits(tensor).numpy())


def end_of_output(memory: Memory, size: int, elements: int, count: int) -> Buffer:
    """An output of so many elements of ``size`` bytes, of which the last ``count`` are there."""
    return memory.part_of_output(size * elements, size * (elements - count), size * count)
