"""llama.cpp's ggml with IQ4_NL, its 4-bit format with a table of levels, repacked by ggml itself as llama.cpp runs it.

It takes float32 activations and rounds them to 8-bit integers (error 7e-3). They are float32 before the time begins,
and its float32 result stays as it is. The library comes from the package libggml-python: the wheel is built for AVX2;
a build for this machine, which is the one to compare with, is what scripts/peers.sh makes:

    USE_OPENMP=1 pip install --no-binary libggml-python -C cmake.define.GGML_NATIVE=ON libggml-python
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Bound, Linear, Peer

F32, IQ4_NL = 0, 20  # enum ggml_type
BLOCK, BLOCK_BYTES = 32, 18  # of IQ4_NL: columns that share a scale, and what they take
ROWS = 8  # that a repacked block interleaves
BASE_POINTERS = (  # functions that return one
    *("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph_custom", "ggml_get_data"),
    "ggml_backend_alloc_ctx_tensors_from_buft",
)
CPU_POINTERS = (
    *("ggml_backend_cpu_init", "ggml_backend_cpu_buffer_type", "ggml_threadpool_new"),
    "_Z35ggml_backend_cpu_repack_buffer_typev",  # the only name under which the library offers it
)
CONTEXT_BYTES = 1 << 20  # for descriptions of tensors and a graph; no data


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class Ggml(Peer):
    name = "ggml IQ4_NL"
    note = "4.5 bits a weight with levels of its own, repacked; it rounds activations to 8 bits, whatever their dtype"
    install = "scripts/peers.sh"
    module = "libggml"

    def linear(self, w: Tensor, dtype: torch.dtype, group_size: int, *, training: bool = False) -> Linear | None:
        n, d = w.shape
        if training or n % ROWS or d % BLOCK:
            return None
        blocks = torch.empty(n * d // BLOCK * BLOCK_BYTES, dtype=torch.uint8)
        decoded = torch.empty(n, d)
        base = library().base
        base.ggml_quantize_chunk(IQ4_NL, pointer(w), pointer(blocks), _i64(0), _i64(n), _i64(d), None)
        base.dequantize_row_iq4_nl(pointer(blocks), pointer(decoded), _i64(n * d))
        return Linear(decoded, blocks.nbytes, lambda: Weight(blocks, n, d))


class Memory:
    """A context with its tensors' memory, freed with the object."""

    def __init__(self) -> None:
        self.context = library().base.ggml_init(InitParams(CONTEXT_BYTES, None, True))
        self.buffer: int | None = None

    def allocate(self, kind: int) -> None:
        base = library().base
        self.buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(_p(self.context), _p(kind))
        if self.buffer is None:
            raise MemoryError("ggml could not allocate")

    def __del__(self) -> None:
        base = library().base
        if self.buffer is not None:
            base.ggml_backend_buffer_free(_p(self.buffer))
        base.ggml_free(_p(self.context))


class Weight:
    """A repacked weight, a Layer."""

    def __init__(self, blocks: Tensor, n: int, d: int) -> None:
        base, cpu = library().base, library().cpu
        self.memory, self.n, self.d = Memory(), n, d
        self.tensor = base.ggml_new_tensor_2d(_p(self.memory.context), IQ4_NL, _i64(d), _i64(n))
        self.memory.allocate(cpu._Z35ggml_backend_cpu_repack_buffer_typev())
        base.ggml_backend_tensor_set(_p(self.tensor), pointer(blocks), _size(0), _size(blocks.nbytes))

    def __call__(self, x: Tensor) -> Bound:
        base, cpu = library().base, library().cpu
        memory, m = Memory(), x.size(0)
        context = _p(memory.context)
        activations = base.ggml_new_tensor_2d(context, F32, _i64(self.d), _i64(m))
        product = base.ggml_mul_mat(context, _p(self.tensor), _p(activations))
        memory.allocate(cpu.ggml_backend_cpu_buffer_type())
        graph = base.ggml_new_graph_custom(context, _size(8), False)
        base.ggml_build_forward_expand(_p(graph), _p(product))
        x32 = x.float().contiguous()
        base.ggml_backend_tensor_set(_p(activations), pointer(x32), _size(0), _size(x32.nbytes))
        data = (ctypes.c_float * (m * self.n)).from_address(base.ggml_get_data(_p(product)))
        y = torch.frombuffer(data, dtype=torch.float32).view(m, self.n).zero_()  # its pages are there before the time
        return Product(self, memory, graph, y)


class Product:
    """One graph of one product, a Bound. It keeps the memory that it works on."""

    def __init__(self, weight: Weight, memory: Memory, graph: int, y: Tensor) -> None:
        self.keeps = weight, memory
        self.arguments = _p(backend(torch.get_num_threads())), _p(graph)
        self.y = y
        self.compute: Callable[..., int] = library().base.ggml_backend_graph_compute

    def __call__(self) -> Tensor:
        if self.compute(*self.arguments) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")
        return self.y


class Library:
    """The two shared libraries, with the types of what does not return an int."""

    def __init__(self) -> None:
        spec = find_spec("libggml")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = Path(next(iter(spec.submodule_search_locations)))
        folder = next(package.glob("lib*/libggml-base.so")).parent
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for library, names in ((self.base, BASE_POINTERS), (self.cpu, CPU_POINTERS)):
            for name in names:
                getattr(library, name).restype = ctypes.c_void_p
        self.base.ggml_init.argtypes = [InitParams]
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.base.ggml_log_set(self.quiet, None)  # it tells of every weight that it repacks


@cache
def library() -> Library:
    return Library()


@cache
def backend(threads: int) -> int:
    """A CPU backend with threads of its own that do not spin while others are being timed; one for each number."""
    base, cpu = library().base, library().cpu
    params = ThreadpoolParams()
    base.ggml_threadpool_params_init(ctypes.byref(params), threads)
    params.poll = 0
    made: int = cpu.ggml_backend_cpu_init()
    cpu.ggml_backend_cpu_set_n_threads(_p(made), threads)
    cpu.ggml_backend_cpu_set_threadpool(_p(made), _p(cpu.ggml_threadpool_new(ctypes.byref(params))))
    return made


def features() -> str:
    """The vector instructions that the library was built for."""
    names = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")
    return " ".join(name for name in names if getattr(library().cpu, f"ggml_cpu_has_{name}")())


def pointer(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


_p, _i64, _size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
