"""What runs on a GPU is skipped without one, or fails if SQUISH_REQUIRE names cuda.

The fixture ``gpu`` asks a test twice: of a GPU, and of the kernels executed on the CPU, which needs nvcc. A module that
asks for neither says NEEDS_NO_GPU.
"""

from __future__ import annotations

import shutil

import pytest

from tests.support.gpus import ExecutedGpu, Gpu, RealGpu, require_a_gpu
from tests.support.helpers import require
from tests.support.once import shared_folder
from tests.support.ptx.host import LIBRARY, compile_kernels


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if not getattr(request.module, "NEEDS_NO_GPU", False) and not {"gpu", "executed"} & set(request.fixturenames):
        require_a_gpu()


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory) -> ExecutedGpu:
    """The kernels of csrc/cuda for compute capability 9.0, on a GPU that numpy plays."""
    nvcc = shutil.which("nvcc")
    require("nvcc", nvcc is not None, "there is no nvcc on the PATH")
    with shared_folder(tmp_path_factory, "kernels") as folder:
        library = folder / LIBRARY
        return ExecutedGpu(library if library.exists() else compile_kernels(str(nvcc), folder))


@pytest.fixture(params=["gpu", pytest.param("executed", marks=pytest.mark.builds)])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    if request.param == "gpu":
        require_a_gpu()
        return RealGpu()
    found: ExecutedGpu = request.getfixturevalue("executed")
    return found
