"""Every torch, Python and compiler that we support: `make compatibility`, or `nox -s core` with `-k "2.13"` for a part.

A row of the matrix takes what a user takes: the sdist, unpacked in a path with spaces, is installed into a virtual
environment with that torch, and the core tests run on the installed package. Then `nox -s table` prints what passed.
CI runs the pinned torch alone (make test); a row takes five to ten minutes, and 6 GB of disk where torch has CUDA.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "build" / "compatibility"
# Each minor version of torch, each Python and both compilers; make test has the pinned torch with Python 3.11 and g++.
MATRIX = [
    ("3.10", "2.11.0", "g++"),
    ("3.11", "2.12.1", "clang++"),
    ("3.11", "2.13.0+cpu", "g++"),
    ("3.12", "2.14.1", "clang++"),
    ("3.13", "2.15.0", "g++"),
    ("3.11", "2.15.0", "clang++"),
]
TOOLS = ("setuptools>=77.0.3", "ninja", "pytest==9.2.0", "pytest-xdist", "hypothesis", "expecttest")
PACKAGES = ("numpy", "safetensors", "zstandard", "typer", "rich")
COLUMNS = "| commit | torch | Python | compiler | CUDA kernels | passed | failed | skipped |\n" + "|---" * 8 + "|"

# What depends on torch or Python. Left out are commands/ and most of package/, which test the repository and its tools,
# and what builds: kernels and programs that know neither, and the package once more.
FOLDERS = ("kernels", "operators", "nn", "compilers", "torchscript", "checkpoint", "package/test_import.py")


@nox.session(venv_backend="venv")
@nox.parametrize(("python", "torch", "compiler"), MATRIX)
def core(session: nox.Session, torch: str, compiler: str) -> None:
    """Build, install and test."""
    if not shutil.which(compiler):
        session.skip(f"{compiler} is not on PATH")
    install_tools(session, torch)
    tree = unpack_sdist(session)
    pip = ["python", "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--force-reinstall"]
    session.run(*pip, str(tree), env={"CXX": compiler, "MAX_JOBS": "2"})
    shutil.rmtree(tree / "squish_nf4")  # or the tests would import it
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{torch}-{session.python}-{compiler}"
    run_tests(session, tree, RESULTS / f"{name}.xml")
    passed, failed, skipped = counts(RESULTS / f"{name}.xml")
    line = f"| {commit(session)} | {built_with(session, tree)} | {passed} | {failed} | {skipped} |"
    (RESULTS / f"{name}.row").write_text(line)
    print(COLUMNS, line, sep="\n")
    if failed or not passed:
        session.error(f"{failed} tests failed, {passed} passed")


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Print what `core` found."""
    print(COLUMNS, *(path.read_text() for path in sorted(RESULTS.glob("*.row"))), sep="\n")


def install_tools(session: nox.Session, torch: str) -> None:
    probe = "from importlib.metadata import version; print(version('torch'))"
    found = session.run("python", "-c", probe, silent=True, success_codes=[0, 1])
    if str(found).strip().split("+")[0] != torch.split("+")[0]:  # a torch that is there is not fetched again
        session.install(f"torch=={torch}")
    session.install(*TOOLS, *PACKAGES)


def unpack_sdist(session: nox.Session) -> Path:
    folder = Path(session.create_tmp()) / "a path with spaces"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "setup.py", "-q", "sdist", "--dist-dir", str(folder), silent=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def run_tests(session: nox.Session, tree: Path, report: Path) -> None:
    folders = [f"tests/{name}" for name in FOLDERS]
    options = ["-q", "-n", "2", "-m", "not builds", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    with session.chdir(tree):
        session.run("python", "-m", "pytest", *options, *folders, success_codes=[0, 1])


def commit(session: nox.Session) -> str:
    """What the sdist was made of; "-dirty" if that is not all committed."""
    words = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=8")
    said = session.run(*words, external=True, silent=True, success_codes=[0, 128])
    return str(said).strip() if (ROOT / ".git").exists() else "unknown"


def built_with(session: nox.Session, tree: Path) -> str:
    """The first columns of the table, as the installed package says them."""
    says = (
        "import platform; import squish_nf4._build_info as built; "
        "print(built.TORCH_VERSION, platform.python_version(), built.COMPILER, built.CUDA_VERSION or 'no', sep=' | ')"
    )
    with session.chdir(tree):
        return str(session.run("python", "-c", says, silent=True)).strip().splitlines()[-1]


def counts(report: Path) -> tuple[int, int, int]:
    """Tests that passed, that failed, and that were skipped, as pytest counted them."""
    suite = ElementTree.parse(report).getroot()[0]
    tests, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    return tests - failures - errors - skipped, failures + errors, skipped


nox.options.sessions = ["core", "table"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
