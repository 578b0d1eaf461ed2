"""What is packed: the wheel and the sdist hold what they should, and the op library finds its neighbours by itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from squish_nf4 import _build_info, library_path
from tests.support import ROOT
from tests.support.cpp_programs import build_with_cmake, build_without_cmake
from tests.support.helpers import require
from tests.support.processes import run

pytestmark = pytest.mark.builds

OWN_BUILD = {"SQUISH_CUDA": "1" if _build_info.CUDA_VERSION else "0"}  # another decision would compile again
TORCH = ".".join(torch.__version__.split(".")[:2])

# A compiler that takes the object that lies in build/ (OBJECTS) for a file of csrc, if there is one.
WITH_OBJECTS_OF = """#!/bin/sh
objects="OBJECTS"
for word; do
  case "$previous" in -c) source=$word;; -o) target=$word;; esac
  previous=$word
done
case "$source" in */csrc/*)
  object="$objects/csrc/${target##*/csrc/}"
  [ -e "$object" ] && exec cp "$object" "$target";;
esac
exec c++ "$@"
"""


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of the objects that the package was linked from."""
    sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    stale = max(path.stat().st_mtime for path in sources) > Path(library_path()).stat().st_mtime
    require("build", not stale, "sources are newer than the library: make setup")
    return ROOT / "build" / f"objects-torch-{torch.__version__}"


@pytest.fixture(scope="module")
def wheel(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked from the objects that lie in build/."""
    folder = tmp_path_factory.mktemp("wheel")
    steps = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"]
    steps += ["bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder]
    done = run([sys.executable, "setup.py", "--quiet", *steps], **OWN_BUILD)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as pip makes it, by this one command; its metadata are written to a folder of their own."""
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "extra.cfg").write_text(f"[egg_info]\negg_base = {folder}\n")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder]
    done = run(command, DIST_EXTRA_CONFIG=str(folder / "extra.cfg"))
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.tar.gz")
    return made


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    ours = {name.removeprefix("squish_nf4/") for name in names if ".dist-info/" not in name}
    shipped = [path for path in (ROOT / "squish_nf4").rglob("*") if path.suffix in (".py", ".h", ".cmake")]
    assert ours == {
        *(path.relative_to(ROOT / "squish_nf4").as_posix() for path in shipped),
        *("_build_info.py", "py.typed", "libsquish_nf4.so", f"_C{suffix}"),
    }
    assert {"include/squish_nf4/nf4.h", "cmake/squish_nf4Config.cmake"} <= ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


IMPORT_EVERY_MODULE = """
import importlib, pkgutil, sys
import squish_nf4
found = [module.name for module in pkgutil.walk_packages(squish_nf4.__path__, "squish_nf4.")]
names = [name for name in found if name != "squish_nf4.libsquish_nf4"]  # a library without Python
for name in names:
    if not name.endswith("__main__"):
        module = importlib.import_module(name)
        assert module.__file__ is None or module.__file__.startswith(sys.argv[1]), module.__file__
print(*names)
"""


def test_every_module_can_be_imported_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel])
    assert done.returncode == 0, done.stderr
    done = run([sys.executable, "-c", IMPORT_EVERY_MODULE, site], cwd=site)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    sources = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "squish_nf4").rglob("*.py")]
    wanted = {".".join(path.parts).removesuffix(".__init__") for path in sources}
    assert wanted - imported == {"squish_nf4"}


def test_wheel_asks_for_the_torch_that_it_was_built_for(wheel: Path) -> None:
    """The source takes many, so the wheel's own requirement and its name are narrower."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    wanted = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    assert wanted is not None
    assert f"torch=={TORCH}.*" in wanted
    assert f"-1torch{TORCH}-" in wheel.name


def test_sdist_takes_every_torch_of_the_range(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        text = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert text is not None
        wanted = Parser().parsestr(text.read().decode()).get_all("Requires-Dist")
    assert wanted is not None
    assert [name for name in wanted if name.startswith("torch")] != [f"torch=={TORCH}.*"]
    assert any(re.fullmatch(r"torch<[\d.]+,>=[\d.]+|torch>=[\d.]+,<[\d.]+", name) for name in wanted)


def test_sdist_is_the_repository(sdist: Path) -> None:
    require("git", shutil.which("git") is not None and (ROOT / ".git").exists(), "this is not a clone")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("squish_nf4.egg-info/")}
    listed = run(["git", "ls-files", "-co", "--exclude-standard"])
    assert listed.returncode == 0, listed.stderr
    assert held - made == {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture
def somebody() -> Iterator[list[str]]:
    """What to put before a command so that root runs it as a user who may read all and write what is theirs."""
    if os.getuid() != 0:
        yield []
        return
    require("setpriv", shutil.which("setpriv") is not None, "not on PATH")
    may_read = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    yield ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *may_read]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """tmp_path lies in a folder that is closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


# As a CUDA tensor would. What an operator with one of these schemas is given does not matter.
CALL_CUDA_KERNELS = """
import squish_nf4, torch
ARGUMENTS = {"Tensor": torch.ones(2, 2), "Optional[Tensor]": None, "Optional[int]": None, "int": 2, "SymInt": 2}
for schema in torch._C._jit_get_all_schemas():
    namespace, _, name = schema.name.partition("::")
    if namespace == "squish":
        op = getattr(getattr(torch.ops.squish, name), schema.overload_name or "default")
        given = [ARGUMENTS[str(part.type)] for part in schema.arguments if not part.kwarg_only]
        named = {part.name: ARGUMENTS[str(part.type)] for part in schema.arguments if part.kwarg_only}
        try:
            op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *given, **named)
        except NotImplementedError as error:
            print(f"{name}.{schema.overload_name}".rstrip("."), str(error).splitlines()[0], sep=": ")
"""


def test_sdist_builds_for_a_user_in_a_path_with_spaces(
    sdist: Path, objects: Path, somebody: list[str], public_folder: Path
) -> None:
    """All but most of the compilers' work, which `make compatibility` does: the objects are taken from build/."""
    home = public_folder / "a path with spaces"
    shutil.unpack_archive(sdist, home)
    compiler = public_folder / "g++"  # by its name torch knows the compiler
    compiler.write_text(WITH_OBJECTS_OF.replace("OBJECTS", str(objects)))
    compiler.chmod(0o755)
    for path in [home, *home.rglob("*")] if somebody else []:
        os.chown(path, 65534, 65534)
    (tree,) = (path for path in home.iterdir() if path.is_dir())
    environment = {"SQUISH_CUDA": "0", "CXX": str(compiler), "HOME": str(home), "MAX_JOBS": "1"}
    done = run([*somebody, sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=tree, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = (tree / "dist").glob("*.whl")
    zipfile.ZipFile(made).extractall(home / "site")
    code = (
        "import squish_nf4, torch; print(squish_nf4.quantize_nf4(torch.ones(1, 2), 2)[0].item(), squish_nf4.__file__)"
    )
    ran = run([*somebody, sys.executable, "-c", code], cwd=home / "site")
    assert ran.stdout.split(maxsplit=1) == ["255", f"{home}/site/squish_nf4/__init__.py\n"], ran.stderr
    ran = run([*somebody, sys.executable, "-c", CALL_CUDA_KERNELS], cwd=home / "site")
    assert ran.returncode == 0, ran.stderr
    answers = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert {"quantize_nf4", "dequantize_nf4", "dequantize_nf4.out", "linear_nf4"} < set(answers)
    for op, answer in answers.items():
        assert answer.startswith(f"{op.partition('.')[0]}: squish_nf4 was built for the CPU only"), op
        assert "squish-nf4 doctor" in answer


# The op library.


def dynamic_section(library: str) -> tuple[set[str], list[str]]:
    """(the libraries it asks for, the folders where it looks first)."""
    require("binutils", shutil.which("readelf") is not None, "readelf is not on PATH")
    said = run(["readelf", "-d", library]).stdout
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", said)
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", said)), ":".join(paths).split(":")


def test_op_library_finds_torch_and_cuda_relative_to_itself(wheel: Path, tmp_path: Path) -> None:
    library = zipfile.ZipFile(wheel).extract("squish_nf4/libsquish_nf4.so", tmp_path)
    needed, folders = dynamic_section(library)
    cuda = _build_info.CUDA_VERSION and f"$ORIGIN/../nvidia/cu{_build_info.CUDA_VERSION.split('.')[0]}/lib"
    assert folders == ["$ORIGIN/../torch/lib", *([cuda] if cuda else [])]
    assert "libtorch_cpu.so" in needed  # not linked into it
    assert Path(library).stat().st_size < 20_000_000


@pytest.mark.parametrize("build", [build_with_cmake, build_without_cmake])
def test_a_cpp_program_runs_with_a_package_that_lies_apart_from_torch(
    wheel: Path, tmp_path: Path, build: Callable[[Path, Path, Path], None]
) -> None:
    """As after ``pip install --target``; the loader is not told of a CUDA toolkit that the system has."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "apart")
    source = tmp_path / "app.cpp"
    source.write_text("int main() {}\n")
    (tmp_path / "build").mkdir()
    build(source, tmp_path / "build" / "app", tmp_path / "apart" / "squish_nf4")
    asked = [run(["c++", f"-print-file-name={name}"]).stdout.strip() for name in ("libc.so.6", "libstdc++.so.6")]
    folders = ":".join(str(Path(path).resolve().parent) for path in asked)
    loader = ["/lib64/ld-linux-x86-64.so.2", "--inhibit-cache", "--library-path", folders]
    done = run([*loader, tmp_path / "build" / "app"], LD_DEBUG="files")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"calling init: {tmp_path}/apart/squish_nf4/libsquish_nf4.so" in done.stderr


def test_op_library_brings_no_threads_of_its_own_and_no_python() -> None:
    """Its threads are torch's, whatever the compiler: GCC and clang have an OpenMP library each."""
    needed, _ = dynamic_section(library_path())
    cuda = {"libc10_cuda.so", f"libcudart.so.{(_build_info.CUDA_VERSION or '').split('.')[0]}"}
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed - system - (cuda if _build_info.CUDA_VERSION else set()) == {"libc10.so", "libtorch_cpu.so"}
    symbols = run(["nm", "-DC", library_path()]).stdout
    assert "torch_parallel_for" in symbols
    assert not re.search(r"\b(omp_|GOMP_|__kmpc_|Py)", symbols)
