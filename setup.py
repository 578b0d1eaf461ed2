"""Builds two shared libraries: the op library (no Python in it) and the pybind11 module that Python imports.

Whatever can be missing (torch, a compiler, Python.h, a CUDA toolkit) is looked for first and named in one sentence.
Environment: SQUISH_CUDA=0|1 (default: CUDA if a toolkit of torch's CUDA major is found), CUDA_HOME, CXX, MAX_JOBS,
TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OP_LIBRARY = "libsquish_nf4"
TORCH = "torch>=2.11,<2.16"  # the range, written here alone: scripts/setup.sh reads this line
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

try:
    import torch
except ImportError:
    torch = None


def put_ninja_on_path() -> None:
    """The ninja that pip installed: a venv that is used without being activated does not have it on PATH."""
    try:
        files = metadata.files("ninja") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "ninja":
            folder = Path(str(file.locate())).resolve().parent
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def version_tuple(parts: Iterable[str]) -> tuple[int, ...]:
    return tuple(int(part) for part in parts)


def torch_minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def dependencies(torch_requirement: str) -> list[str]:
    return [torch_requirement, "numpy", "safetensors", "zstandard", "typer", "rich"]


def stop(sentence: str) -> NoReturn:
    sys.exit(f"squish_nf4: {sentence}")


def require_platform() -> None:
    if not sys.platform.startswith("linux"):
        stop(f"building on {sys.platform} is not supported; squish_nf4 is built and tested on Linux (x86-64) only.")


def require_setuptools() -> None:
    """Without build isolation nobody else looks at [build-system] requires, and Python 3.11's venv brings 65.5."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        stop(f"setuptools {setuptools.__version__} is installed; type: pip install 'setuptools>=77.0.3' ninja")


def require_torch() -> None:
    if torch is None:
        stop(
            "torch is not installed in the environment that builds, but the build has to see the torch that you will "
            "run; install torch first and then type: pip install --no-build-isolation ."
        )
    low, high = re.findall(r"(\d+)\.(\d+)", TORCH)
    if not version_tuple(low) <= version_tuple(torch.__version__.split(".")[:2]) < version_tuple(high):
        stop(f"torch {torch.__version__} is installed; {TORCH} is wanted; type: pip install '{TORCH}'")


def require_writable_source() -> None:
    """pip builds where the source lies, and does not copy it."""
    for folder in (ROOT, ROOT / "build", ROOT / "squish_nf4.egg-info"):
        if folder.exists() and not os.access(folder, os.W_OK):
            stop(f"{folder} is not writable, and the build writes there; copy the source to a folder of your own.")


def require_python_headers() -> None:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        stop(f"Python.h is not in {include}; install the Python headers (Debian: apt install python3-dev).")


def compiler() -> list[str]:
    """The C++ compiler and its first arguments, as torch chooses it."""
    return (os.environ.get("CXX") or "c++").split()


def require_cpp20_compiler() -> None:
    name = " ".join(compiler())
    advice = "install g++ 11 or newer (Debian: apt install g++), or set CXX."
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <bit>\nint main() { return std::bit_cast<int>(0.0f); }\n")
        command = [*compiler(), "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            stop(f"the C++ compiler '{name}' does not run; {advice}")
    if probe.returncode != 0:
        stop(f"the C++ compiler '{name}' does not compile C++20; {advice}")


def toolkit_version(root: Path) -> str | None:
    """The release of the toolkit's nvcc ("13.0"), or None if there is none that runs."""
    try:
        text = subprocess.run([str(root / "bin/nvcc"), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def toolkit_of_nvcc_on_path() -> Path | None:
    """The toolkit's root as nvcc itself reports it: the nvcc on PATH may be a link or a wrapper from elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    try:
        dryrun = subprocess.run([nvcc, "-v", "--dryrun", "probe.cu"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return Path(found.group(1).strip()).resolve() if found else None


def toolkit_of_pip(major: str) -> Path | None:
    """The toolkit that pip installed: the packages nvidia-cuda-nvcc, -crt, -cccl and -runtime share one folder."""
    folders = (Path(entry) / "nvidia" / f"cu{major}" for entry in sys.path)
    return next((folder for folder in folders if (folder / "bin" / "nvcc").is_file()), None)


def find_cuda_toolkit() -> tuple[Path, str] | None:
    """The toolkit to build with and its version, or None; prints the decision and its reason."""
    wish = os.environ.get("SQUISH_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"SQUISH_CUDA must be 0 or 1, got '{wish}'.")
    if wish == "0":
        print("squish_nf4: building for the CPU only (SQUISH_CUDA=0)")
        return None
    wanted = torch.version.cuda
    if wanted is None:
        places, reason = [], "this torch is a CPU build"
    elif explicit := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        places, reason = [Path(explicit)], f"no nvcc runs in {explicit}/bin, where CUDA_HOME points"
    else:
        major = wanted.split(".")[0]
        places = [toolkit_of_nvcc_on_path(), toolkit_of_pip(major), Path("/usr/local/cuda")]
        reason = f"no CUDA {major} toolkit was found"
    for root in places:
        version = toolkit_version(root) if root else None
        if version and version.split(".")[0] == wanted.split(".")[0]:
            print(f"squish_nf4: building for CPU and CUDA {version} (toolkit in {root}; torch has CUDA {wanted})")
            return root, version
        if version:
            reason = f"the toolkit in {root} is CUDA {version}, torch has CUDA {wanted}"
    if wish == "1":
        stop(f"SQUISH_CUDA=1, but {reason}; install the CUDA toolkit that fits torch, or set CUDA_HOME.")
    print(f"squish_nf4: building for the CPU only ({reason})")
    return None


def architectures_of(toolkit: Path) -> str:
    """Those of CUDA_ARCHITECTURES that this toolkit knows, the last one with PTX for the GPUs to come."""
    listed = subprocess.run([str(toolkit / "bin/nvcc"), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = [arch for arch in CUDA_ARCHITECTURES if arch.replace(".", "") in known]
    if not wanted:
        stop(f"nvcc in {toolkit} compiles for none of {', '.join(CUDA_ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST.")
    return ";".join(wanted) + "+PTX"


def compiler_version() -> str:
    out = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    return out.splitlines()[0] if out else "unknown"


def sources(*folders: str) -> list[str]:
    """Relative to the root, as setuptools wants them, in a fixed order. A .cuh is a header."""
    files = (path for folder in folders for path in (ROOT / "csrc" / folder).iterdir())
    return sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in (".cpp", ".cu"))


def op_library_sources(cuda: bool) -> list[str]:
    """With CUDA it takes csrc/cuda and csrc/ops/cuda_*.cpp, without csrc/ops/without_cuda.cpp."""
    if cuda:
        return [source for source in sources("cpu", "cuda", "ops") if source != "csrc/ops/without_cuda.cpp"]
    return [source for source in sources("cpu", "ops") if not source.startswith("csrc/ops/cuda_")]


def write_build_info(folder: Path, cuda: str | None, inplace: bool) -> None:
    """What the package checks before it loads a native file: see squish_nf4/_native.py.

    An editable package does not lie beside torch, so its CMake configuration is told where torch is.
    """
    lines = [
        '"""Written by setup.py: what the native libraries beside this file were built with."""',
        "",
        f"TORCH_VERSION = {str(torch.__version__)!r}",
        f"TORCH_CUDA = {torch.version.cuda!r}",
        f"CUDA_VERSION: str | None = {cuda!r}",
        f"COMPILER = {compiler_version()!r}",
        *([f"TORCH_ROOT = {str(Path(torch.__file__).parent)!r}"] if inplace else []),
    ]
    (folder / "_build_info.py").write_text("\n".join(lines) + "\n")


def configure_op_library(extension: Extension, toolkit: tuple[Path, str] | None, inplace: bool) -> None:
    torch_root = Path(torch.__file__).parent
    extension.sources = op_library_sources(cuda=False)
    extension.include_dirs = [str(ROOT)]
    extension.library_dirs = [str(torch_root / "lib")]
    extension.libraries = ["c10", "torch_cpu"]
    libraries = ["torch/lib"]
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    headers = [f"-isystem{torch_root / path}" for path in ("include", "include/torch/csrc/api/include")]
    extension.extra_compile_args = {"cxx": flags + headers}
    if toolkit:
        root, version = toolkit
        extension.sources = op_library_sources(cuda=True)
        major = version.split(".")[0]
        extension.include_dirs += [str(root / "include"), str(root / "include" / "cccl")]
        extension.library_dirs += [str(root / lib) for lib in ("lib64", "lib") if (root / lib).is_dir()]
        extension.libraries += ["c10_cuda", f":libcudart.so.{major}"]  # pip's toolkit has no plain libcudart.so
        libraries.append(f"nvidia/cu{major}/lib")
        # No fused multiply-add, no flush of subnormals, correctly rounded division: the bits are those of the CPU.
        exact = ["-fmad=false", "-ftz=false", "-prec-div=true"]
        extension.extra_compile_args["nvcc"] = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", *exact]
    # What is built in place does not lie beside torch: C++ programs load it, and nobody has loaded torch for them.
    roots = ["$ORIGIN/..", str(torch_root.parent)] if inplace else ["$ORIGIN/.."]
    rpath = ":".join(f"{root}/{library}" for root in roots for library in libraries)
    extension.extra_link_args = [f"-Wl,-rpath,{rpath}", f"-Wl,-soname,{OP_LIBRARY}.so"]


def configure_python_module(extension: Extension, build_lib: str) -> None:
    extension.include_dirs = [str(ROOT)]
    extension.library_dirs = [str(Path(build_lib) / "squish_nf4")]
    extension.libraries = [OP_LIBRARY.removeprefix("lib")]
    headers = f"-isystem{Path(torch.__file__).parent / 'include'}"  # pybind11
    extension.extra_compile_args = {"cxx": ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", headers]}
    extension.extra_link_args = ["-Wl,-rpath,$ORIGIN"]


def build_command() -> type[build_ext]:
    """torch's BuildExtension (ninja, nvcc) with our checks before it; without torch, the checks alone."""
    if torch is None:
        base: type[build_ext] = build_ext
    else:
        logging.disable(logging.WARNING)  # it would tell of the toolkit that it guesses; we find the right one
        from torch.utils.cpp_extension import BuildExtension as base  # noqa: N813

        logging.disable(logging.NOTSET)
        put_ninja_on_path()  # BuildExtension looks for it as soon as it is made

    class BuildNative(base):  # type: ignore[misc,valid-type]
        def finalize_options(self) -> None:
            super().finalize_options()
            if torch is not None:  # kept: every build begins where the last one for this torch ended
                self.build_temp = str(ROOT / "build" / f"objects-torch-{torch.__version__}")

        def run(self) -> None:
            require_platform()
            require_torch()
            require_writable_source()
            require_cpp20_compiler()
            require_python_headers()
            toolkit = find_cuda_toolkit()
            cuda = toolkit[1] if toolkit else None
            if toolkit:
                self.use_toolkit(toolkit[0])
            op_library, python_module = self.extensions
            configure_op_library(op_library, toolkit, self.inplace)
            configure_python_module(python_module, self.build_lib)
            super().run()
            write_build_info((ROOT if self.inplace else Path(self.build_lib)) / "squish_nf4", cuda, self.inplace)

        def use_toolkit(self, root: Path) -> None:
            import torch.utils.cpp_extension as cpp_extension

            cpp_extension.CUDA_HOME = str(root)  # it has guessed already, wrongly if nvcc on PATH is a wrapper
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures_of(root))

        def get_ext_filename(self, name: str) -> str:
            if name.split(".")[-1] == OP_LIBRARY:  # asked for with and without the package's name
                return f"{name.replace('.', '/')}.so"  # loaded by C++ programs too: no Python suffix
            return str(super().get_ext_filename(name))

    return BuildNative


class DistInfo(dist_info):
    """What pip asks for first: without torch it is told at once, not after fetching the dependencies."""

    def run(self) -> None:
        require_platform()
        require_torch()
        require_writable_source()
        super().run()


class Sdist(sdist):
    """The source takes every torch of the range; what is built of it takes the one that it was built for."""

    def run(self) -> None:
        wide = dependencies(TORCH)
        self.distribution.install_requires = self.distribution.metadata.install_requires = wide
        super().run()


class BuildPy(build_py):
    """Begins with an empty folder: a module that was renamed since the last build would still be installed."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "squish_nf4", ignore_errors=True)
        super().run()


require_setuptools()  # now: an older one cannot read pyproject.toml
setup(
    ext_modules=[
        Extension(f"squish_nf4.{OP_LIBRARY}", op_library_sources(cuda=False), language="c++"),
        Extension("squish_nf4._C", sources("python"), language="c++"),
    ],
    cmdclass={
        "build_ext": build_command(),
        "build_py": BuildPy,
        "dist_info": DistInfo,
        "sdist": Sdist,
    },
    # The name of a wheel says for which torch it is: two of them can lie in one folder.
    options={"bdist_wheel": {"build_number": f"1torch{torch_minor()}"}} if torch else {},
    install_requires=dependencies(f"torch=={torch_minor()}.*" if torch else TORCH),
)
