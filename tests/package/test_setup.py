"""Setting up: what is missing is named in one sentence, and the right toolkit is found.

setup.py runs here in two ways: as a user runs it, in a process of its own; and as a module whose functions are called.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

from squish_nf4 import _build_info, _native, library_path
from tests.support import ROOT
from tests.support.helpers import require
from tests.support.processes import HIDE_PACKAGES, assert_one_sentence, run
from tests.support.ptx.host import EXACT, NO_WARNING

pytestmark = pytest.mark.sweeps  # a fresh Python for nearly every test

BUILD = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "/nonexistent"]
WITHOUT_TORCH = HIDE_PACKAGES.format(hidden=["torch"])
WITHOUT_HEADERS = """
import sysconfig

find = sysconfig.get_path
sysconfig.get_path = lambda name, *args, **named: "/no/headers" if name == "include" else find(name, *args, **named)
"""
ON_WINDOWS = """
import logging, runpy, sys, setuptools

logging.disable(logging.WARNING)
import torch.utils.cpp_extension  # as Linux's, for what Windows' would import is not here

sys.argv = ["setup.py", "build_ext"]
sys.platform = "win32"
runpy.run_path("setup.py", run_name="__main__")
"""


def test_without_torch_it_says_how_to_build(tmp_path: Path) -> None:
    done = run(BUILD, sitecustomize=(tmp_path, WITHOUT_TORCH))
    assert_one_sentence(done, "torch is not installed", "type: pip install --no-build-isolation .")


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "build_wheel"])
def test_isolated_pip_install_says_how_to_build(hook: str, tmp_path: Path) -> None:
    """What `pip install .` calls in an environment without torch. The first hook stops it, before any download."""
    (tmp_path / "site").mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
    done = run([sys.executable, "-c", code], sitecustomize=(tmp_path / "site", WITHOUT_TORCH))
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said[-1].startswith("squish_nf4: torch is not installed in the environment that builds")


def test_without_python_headers_it_names_them(tmp_path: Path) -> None:
    done = run(BUILD, sitecustomize=(tmp_path, WITHOUT_HEADERS))
    assert_one_sentence(done, "Python.h is not in /no/headers", "apt install python3-dev")


def test_without_a_compiler_it_names_it() -> None:
    assert_one_sentence(run(BUILD, CXX="no-such-c++"), "'no-such-c++' does not run; install g++ 11 or newer")


def test_with_an_old_compiler_it_says_what_is_wanted(tmp_path: Path) -> None:
    old = script(tmp_path / "old-g++", 'case "$*" in *c++20*) echo "unrecognized option" >&2; exit 1;; esac')
    assert_one_sentence(run(BUILD, CXX=str(old)), "does not compile C++20; install g++ 11 or newer")


def test_on_windows_it_says_what_is_supported() -> None:
    assert_one_sentence(run([sys.executable, "-c", ON_WINDOWS]), "building on win32 is not supported", "Linux")


def test_asking_for_cuda_without_a_toolkit_fails(tmp_path: Path) -> None:
    require("cuda-torch", torch.version.cuda is not None, f"torch {torch.__version__} is a CPU build")
    done = run(BUILD, SQUISH_CUDA="1", CUDA_HOME=str(tmp_path))
    assert_one_sentence(done, f"SQUISH_CUDA=1, but no nvcc runs in {tmp_path}/bin", "set CUDA_HOME")


def test_make_is_not_needed(tmp_path: Path) -> None:
    """With a PATH of compilers alone every check passes, up to the nonsense that we ask for."""
    for tool in ("c++", "as", "ld"):
        found = shutil.which(tool)
        require(tool, found is not None, "not on PATH")
        (tmp_path / tool).symlink_to(str(found))
    done = run(BUILD, SQUISH_CUDA="2", PATH=str(tmp_path))
    assert_one_sentence(done, "SQUISH_CUDA must be 0 or 1, got '2'")


# The decisions, on made-up toolkits.


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ("compute_75 compute_80 compute_86 compute_89 compute_90", "7.5;8.0;8.6;8.9;9.0+PTX"),
        ("compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_120 compute_121",
         "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("compute_90 compute_100 compute_120", "9.0;10.0;12.0+PTX"),
    ],
)  # fmt: skip
def test_an_older_toolkit_compiles_for_the_gpus_it_knows(
    setup_py: dict[str, Any], tmp_path: Path, known: str, chosen: str
) -> None:
    script(tmp_path / "bin" / "nvcc", f'test "$1" = --list-gpu-arch && printf "%s\\n" {known}')
    assert setup_py["architectures_of"](tmp_path) == chosen


def test_a_toolkit_that_knows_none_of_our_gpus_is_named(setup_py: dict[str, Any], tmp_path: Path) -> None:
    script(tmp_path / "bin" / "nvcc", "echo compute_50")
    with pytest.raises(SystemExit, match=r"compiles for none of 7\.5, 8\.0"):
        setup_py["architectures_of"](tmp_path)


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """setup.py's names. It believes in a torch with CUDA 13.0 and sees no toolkit but those a test makes."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py", run_name="setup_py")
    names["find_cuda_toolkit"].__globals__["torch"] = SimpleNamespace(
        __version__="2.14.0", version=SimpleNamespace(cuda="13.0")
    )
    for variable in ("SQUISH_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return names["find_cuda_toolkit"].__globals__


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: str) -> Path:
    dryrun = f"echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2"
    answer = f"echo 'Cuda compilation tools, release {version}, V{version}.48'"
    script(root / "bin" / "nvcc", f'case "$1" in --version) {answer};; *) {dryrun};; esac')
    return root


def on_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_wrapper_on_path_leads_to_the_toolkit_behind_it(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toolkit(tmp_path / "cuda-13.1", "13.1")
    script(tmp_path / "bin" / "nvcc", f'exec {root}/bin/nvcc "$@"')
    on_path(monkeypatch, tmp_path / "bin")
    assert setup_py["find_cuda_toolkit"]() == (root.resolve(), "13.1")
    assert (
        f"building for CPU and CUDA 13.1 (toolkit in {root.resolve()}; torch has CUDA 13.0)" in capsys.readouterr().out
    )


def test_cuda_home_wins_over_path(setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(monkeypatch, toolkit(tmp_path / "on-path", "13.1") / "bin")
    home = toolkit(tmp_path / "home", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py["find_cuda_toolkit"]() == (home, "13.0")


def test_toolkit_of_pip_comes_after_path_and_before_the_systems(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.1")
    toolkit(tmp_path / "site" / "nvidia" / "cu12", "12.9")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nothing"), str(tmp_path / "site")])
    monkeypatch.setenv("PATH", "/nothing")
    assert setup_py["find_cuda_toolkit"]() == (ours, "13.1")
    on_path(monkeypatch, toolkit(tmp_path / "on-path", "13.0") / "bin")
    assert setup_py["find_cuda_toolkit"]() == (tmp_path / "on-path", "13.0")


def test_a_toolkit_without_a_plain_libcudart_is_linked_by_its_full_name(
    setup_py: dict[str, Any], tmp_path: Path
) -> None:
    library = setuptools.Extension("squish_nf4.libsquish_nf4", [])
    setup_py["torch"].__file__ = torch.__file__
    setup_py["configure_op_library"](library, (tmp_path, "13.1"), inplace=False)
    assert ":libcudart.so.13" in library.libraries
    assert "cudart" not in library.libraries


def test_toolkit_of_another_major_is_refused(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = toolkit(tmp_path / "cuda-12", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py["find_cuda_toolkit"]() is None
    reason = f"the toolkit in {home} is CUDA 12.8, torch has CUDA 13.0"
    assert f"building for the CPU only ({reason})" in capsys.readouterr().out
    monkeypatch.setenv("SQUISH_CUDA", "1")
    with pytest.raises(SystemExit, match=reason):
        setup_py["find_cuda_toolkit"]()


def test_squish_cuda_0_builds_for_the_cpu(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "13.0")))
    monkeypatch.setenv("SQUISH_CUDA", "0")
    assert setup_py["find_cuda_toolkit"]() is None
    assert "building for the CPU only (SQUISH_CUDA=0)" in capsys.readouterr().out
    library = setuptools.Extension("squish_nf4.libsquish_nf4", [])
    setup_py["torch"].__file__ = torch.__file__
    setup_py["configure_op_library"](library, None, inplace=False)
    assert [name for name in [*library.sources, *library.libraries] if "cuda" in name] == ["csrc/ops/without_cuda.cpp"]


def test_cpu_torch_builds_for_the_cpu(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_py["torch"].version.cuda = None
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "13.0")))
    assert setup_py["find_cuda_toolkit"]() is None
    assert "(this torch is a CPU build)" in capsys.readouterr().out


def test_an_nvcc_that_does_not_run_is_no_toolkit(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin" / "nvcc", "").write_bytes(b"\x7fELF for another machine")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_py["toolkit_of_nvcc_on_path"]() is None
    assert setup_py["toolkit_version"](tmp_path) is None


def test_an_old_setuptools_is_named(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's venv brings 65.5, which dies of our pyproject.toml with a traceback."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match=r"setuptools 65.5.0 is installed; type: pip install 'setuptools>=77.0.3' ninja"
    ):
        runpy.run_path("setup.py", run_name="setup_py")


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0a0+git1", "1.13.0"])
def test_a_torch_that_does_not_fit_is_named(setup_py: dict[str, Any], version: str) -> None:
    setup_py["torch"].__version__ = version
    said = f"torch {version} is installed; {setup_py['TORCH']} is wanted; type: pip install '{setup_py['TORCH']}'"
    with pytest.raises(SystemExit, match=re.escape(said)):
        setup_py["require_torch"]()


def test_the_matrix_covers_the_range_and_no_more(setup_py: dict[str, Any]) -> None:
    """noxfile.py names the torches, setup.py the range, and requirements.txt the one of CI."""
    matrix = re.findall(r'"3\.\d+", "(2\.\d+)\.\d', (ROOT / "noxfile.py").read_text())
    low, high = (int(minor) for _, minor in re.findall(r"(\d+)\.(\d+)", setup_py["TORCH"]))
    assert set(matrix) == {f"2.{minor}" for minor in range(low, high)}
    for version in matrix:
        setup_py["torch"].__version__ = f"{version}.0"
        setup_py["require_torch"]()
    pinned = re.search(r"^torch==(2\.\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned.group(1) in matrix


@pytest.mark.parametrize("place", ["README.md", "docs/compatibility.md"])
def test_the_range_that_users_read_is_that_of_the_build(setup_py: dict[str, Any], place: str) -> None:
    assert set(re.findall(r"torch>=[\d.]+,<[\d.]+", (ROOT / place).read_text())) == {setup_py["TORCH"]}


def test_a_source_that_cannot_be_written_is_named(
    setup_py: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_py["ROOT"] = tmp_path
    setup_py["require_writable_source"]()
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "build")  # after `sudo pip install .`
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path}/build is not writable, and the build writes there")):
        setup_py["require_writable_source"]()


@pytest.mark.parametrize(
    ("built", "running", "part"),
    [
        (("2.14.1+cu130", "13.0"), ("2.14.0+cu130", "13.0"), None),
        (("2.14.1+cu130", None), ("2.14.1+cpu", None), None),
        (("2.14.1+cu130", "13.0"), ("2.14.1+cu132", "13.2"), None),
        (("2.14.1+cu130", "13.0"), ("2.13.0+cu130", "13.0"), "built for torch 2.14.1+cu130, but torch 2.13.0+cu130 is"),
        (("2.14.1+cu130", "13.0"), ("2.14.1+cpu", None), "built for CUDA 13.0, but this torch is a CPU build"),
        (
            ("2.14.1+cu130", "13.0"),
            ("2.14.1+cu129", "12.9"),
            "built for CUDA 13.0, but this torch is built for CUDA 12.9",
        ),
    ],
)
def test_a_library_that_does_not_fit_its_torch_is_told(
    built: tuple[str, str | None], running: tuple[str, str | None], part: str | None
) -> None:
    reason = _native.misfit(*built, *running)
    if part is None:
        assert reason is None
    else:
        assert reason is not None
        assert part in reason
        assert "rebuild it for this torch: pip install --no-build-isolation" in reason


# scripts/setup.sh, up to where it would fetch something.


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("scripts/setup.sh", "requirements.txt", "setup.py"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"PYTHON": "no-such-python"}, "the interpreter 'no-such-python' was not found"),
        ({"CXX": "no-such-c++ -m64"}, "the C++ compiler 'no-such-c++ -m64' was not found; install g++ 11 or newer"),
    ],
)
def test_setup_script_looks_before_it_fetches(environment: dict[str, str], sentence: str, clone: Path) -> None:
    done = run([clone / "scripts" / "setup.sh"], **{"PYTHON": sys.executable, **environment})
    assert_one_sentence(done, sentence)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("version_info", "Python 3.10 or newer is wanted"),
        ("ensurepip", "has no venv module; install it (Debian: apt install python3-venv)"),
        ("Python.h", "has no Python.h; install the Python headers (Debian: apt install python3-dev)"),
    ],
)
def test_setup_script_asks_the_interpreter(question: str, sentence: str, clone: Path, tmp_path: Path) -> None:
    """An interpreter that answers one question with no."""
    python = script(tmp_path / "python", f'case "$*" in *{question}*) exit 1;; esac\nexec {sys.executable} "$@"')
    assert_one_sentence(run([clone / "scripts" / "setup.sh"], PYTHON=str(python)), sentence)


@pytest.mark.parametrize(
    ("version", "taken"), [("2.10.2", False), ("2.11.0", True), ("2.15.1+cpu", True), ("2.16.0", False), ("3.1", False)]
)
def test_setup_script_takes_the_interpreters_torch_if_it_is_in_the_range(
    version: str, taken: bool, clone: Path, tmp_path: Path
) -> None:
    """An interpreter with such a torch, that then makes no venv."""
    (tmp_path / "site" / f"torch-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (tmp_path / "site" / f"torch-{version}.dist-info" / "METADATA").write_text(metadata)
    body = f'case "$*" in "-m venv"*) exit 1;; esac\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"'
    done = run([clone / "scripts" / "setup.sh"], PYTHON=str(script(tmp_path / "python", body)))
    assert done.returncode == 1
    assert (f"which has torch {version}" in done.stdout) == taken, done.stdout


# The CUDA kernels.


def architectures(library: bytes) -> set[str]:
    """The real architectures that nvcc noted in a fat binary, as ptxas options or kernel names do not."""
    return {found.decode() for found in re.findall(rb"sm_\d+", library)}


def test_cuda_library_holds_every_architecture() -> None:
    require("nvcc", _build_info.CUDA_VERSION is not None, "the package was built for the CPU only")
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} <= architectures(
        Path(library_path()).read_bytes()
    )


@pytest.mark.builds
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_kernels_compile_without_a_warning_for_the_oldest(name: str, tmp_path: Path) -> None:
    """For newer ones, where other lines are compiled, the kernels that tests execute do (tests/support/ptx/host.py)."""
    nvcc = shutil.which("nvcc")
    require("nvcc", nvcc is not None, "not on PATH")
    source, target = ROOT / "csrc" / "cuda" / f"{name}.cu", tmp_path / f"{name}.o"
    done = run([str(nvcc), *EXACT, *NO_WARNING, f"-I{ROOT}", "-arch=sm_75", "-c", source, "-o", target])
    assert done.returncode == 0, done.stderr
    assert "sm_75" in architectures(target.read_bytes())
