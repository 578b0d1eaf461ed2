"""find_package(squish_nf4): which torch it links, and the sentence that says what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import squish_nf4
from tests.support.cpp_programs import required_cmake
from tests.support.helpers import require
from tests.support.processes import run

pytestmark = pytest.mark.builds
PREFIX = Path(squish_nf4.cmake_prefix_path())
TORCH = Path(torch.__file__).resolve().parent
ADVICE = (
    "set SQUISH_NF4_TORCH to the folder of LibTorch or of Python's torch "
    "(python -c 'import torch; print(torch.__path__[0])')"
)
BUILT_FOR = "squish_nf4 was built for torch " + ".".join(torch.__version__.split(".")[:2])


def configure(
    folder: Path, *options: str, before: str = "", wanted: str = "", prefix: Path = PREFIX, cmake: Path | None = None
) -> tuple[int, str]:
    """The exit status and the words of cmake, started in ``folder``; the project prints where torch's headers are."""
    (folder / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject(p CXX)\n{before}\n"
        f"find_package(squish_nf4 {wanted} CONFIG REQUIRED)\n"
        "get_target_property(linked squish_nf4::squish_nf4 INTERFACE_LINK_LIBRARIES)\n"
        "get_target_property(headers ${linked} INTERFACE_INCLUDE_DIRECTORIES)\n"
        'message(STATUS "links ${linked} with ${headers}.")\n'
    )
    command = [str(cmake or required_cmake()), "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}", *options]
    done = run(command, cwd=folder)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def copy_of_package(folder: Path) -> Path:
    """What CMake reads of the package, where no torch is in sight; returns the prefix."""
    shutil.copytree(PREFIX, folder / "cmake")
    shutil.copy(PREFIX.parent / "_version.py", folder)
    (folder / "libsquish_nf4.so").touch()
    (folder / "_build_info.py").write_text(f"TORCH_VERSION = '{torch.__version__}'\nTORCH_ROOT = '{folder}/torch'\n")
    return folder / "cmake"


def other_torch(folder: Path, version: str | None) -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "libtorch_cpu.so").touch()
    if version is not None:
        (folder / "include" / "torch" / "headeronly").mkdir(parents=True)
        major, minor = version.split(".")
        lines = f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n"
        (folder / "include" / "torch" / "headeronly" / "version.h").write_text(lines)
    return folder


def test_cmake_of_the_system_configures_too(tmp_path: Path) -> None:
    system = Path("/usr/bin/cmake")
    require("system-cmake", system.exists(), "there is no /usr/bin/cmake")
    status, said = configure(tmp_path, cmake=system)
    assert (status, f"links squish_nf4::torch with {TORCH}/include" in said) == (0, True), said


def test_another_version_of_squish_nf4_is_refused(tmp_path: Path) -> None:
    status, said = configure(tmp_path, wanted="99")
    assert status != 0
    assert squish_nf4.__version__ in said


def test_without_any_torch_the_advice_is_a_command_that_can_be_typed(tmp_path: Path) -> None:
    status, said = configure(tmp_path, prefix=copy_of_package(tmp_path / "squish_nf4"))
    assert status != 0
    assert f"squish_nf4 finds no torch; {ADVICE}" in said


def test_without_the_op_library_it_says_how_to_build_it(tmp_path: Path) -> None:
    prefix = copy_of_package(tmp_path / "squish_nf4")
    (tmp_path / "squish_nf4" / "libsquish_nf4.so").unlink()
    status, said = configure(tmp_path, prefix=prefix)
    assert status != 0
    assert f"{tmp_path}/squish_nf4 has no op library; build it: pip install --no-build-isolation ." in said


def test_a_relative_torch_starts_where_cmake_was_started(tmp_path: Path) -> None:
    """The source and the build lie elsewhere; and what was found stays, wherever cmake is started the next time."""
    prefix = copy_of_package(tmp_path / "squish_nf4")
    (tmp_path / "a torch").symlink_to(TORCH)
    (tmp_path / "elsewhere").mkdir()
    configure(tmp_path / "elsewhere", prefix=prefix)  # writes the project; there is no torch to find
    command = [str(required_cmake()), "-S", "elsewhere", "-B", "elsewhere/build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    for again in ([*command, "-DSQUISH_NF4_TORCH=a torch"], [str(required_cmake()), str(tmp_path / "elsewhere/build")]):
        done = run(again, cwd=tmp_path if again[1] == "-S" else Path("/"))
        assert done.returncode == 0, done.stderr
        assert f"links squish_nf4::torch with {TORCH}/include" in done.stdout


def test_a_folder_without_torch_is_named_in_full(tmp_path: Path) -> None:
    status, said = configure(tmp_path, "-DSQUISH_NF4_TORCH=absent")
    assert status != 0
    assert f"SQUISH_NF4_TORCH is {tmp_path}/absent, but there is no lib/libtorch_cpu.so in it; {ADVICE}" in said


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("2.3", f"{BUILT_FOR}, but the torch in {{}} is 2.3; build squish_nf4 for that, or {ADVICE}"),
        (None, f"cannot tell which torch is in {{}}: there is no torch/version.h in its include directories; {ADVICE}"),
    ],
    ids=["another version", "no version"],
)
def test_a_torch_that_does_not_fit_is_named(tmp_path: Path, version: str | None, sentence: str) -> None:
    torch_there = other_torch(tmp_path / "torch", version)
    status, said = configure(tmp_path, f"-DSQUISH_NF4_TORCH={torch_there}")
    assert status != 0
    assert sentence.format(torch_there) in said


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("2.3", f"{BUILT_FOR}, but the torch {{}} is 2.3; build squish_nf4 for that, or {ADVICE}"),
        (None, f"cannot tell which torch is {{}}: there is no torch/version.h in its include directories; {ADVICE}"),
    ],
    ids=["another torch", "something else"],
)
def test_a_target_named_torch_that_does_not_fit_is_refused_and_the_advice_helps(
    tmp_path: Path, version: str | None, sentence: str
) -> None:
    headers = other_torch(tmp_path / "torch", version) / "include"
    target = f'add_library(torch INTERFACE)\ntarget_include_directories(torch INTERFACE "{headers}")'
    status, said = configure(tmp_path, before=target if version else "add_library(torch INTERFACE)")
    assert status != 0
    assert sentence.format("behind this project's target `torch`") in said
    status, said = configure(tmp_path, f"-DSQUISH_NF4_TORCH={TORCH}", before=target)
    assert (status, f"links squish_nf4::torch with {TORCH}/include" in said) == (0, True), said


def test_a_target_named_torch_that_fits_is_linked(tmp_path: Path) -> None:
    target = f'add_library(torch INTERFACE)\ntarget_include_directories(torch INTERFACE "{TORCH}/include")'
    status, said = configure(tmp_path, before=target)
    assert (status, f"links torch with {TORCH}/include." in said) == (0, True), said
