"""Every torch, Python and compiler that we support: `make compatibility`, or `nox -s core` with `-k "2.13"` for a part.

A row of the matrix takes what a user takes: the sdist, unpacked in a path with spaces, is installed into a virtual
environment with that torch, and the core tests run on the installed package. Then `nox -s table` prints what passed.
CI runs the pinned torch alone (make test); this takes about half an hour and 5 GB of disk for each torch with CUDA.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "build" / "compatibility"
MATRIX = [
    ("3.10", "2.11.0"),
    ("3.11", "2.11.0"),
    ("3.11", "2.12.1"),
    ("3.11", "2.13.0+cpu"),
    ("3.11", "2.14.1"),
    ("3.12", "2.14.1"),
    ("3.11", "2.15.0"),
    ("3.13", "2.15.0"),
]
COMPILERS = ("g++", "clang++")
TOOLS = ("setuptools>=77.0.3", "ninja", "pytest==9.2.0", "pytest-xdist", "hypothesis", "expecttest")
PACKAGES = ("numpy", "safetensors", "zstandard", "typer", "rich")
COLUMNS = "| torch | Python | compiler | CUDA kernels | passed | failed | skipped | left out |\n" + "|---" * 8 + "|"

# What depends on torch or Python. The rest tests the repository, its tools, or kernels that know neither.
CORE = [
    "autograd",
    "convert",
    "decoding",
    "dynamic_shapes",
    "encode",
    "errors",
    "exactness",
    "linear",
    "nf4linear",
    "nf4linear_export",
    "nf4linear_state",
    "npy_dir",
    "operators",
    "packer",
    "quantize_model",
    "save_and_load",
    "source",
    "tied_weights",
    "vmap",
]
# Name of a test, and of the torches that cannot do it.
LEFT_OUT = {
    "a_transformers_model_is_quantized_and_still_works": ("2.11", "2.12", "2.13", "2.14", "2.15"),  # make test has it
}


@nox.session
@nox.parametrize(("python", "torch"), MATRIX)
def core(session: nox.Session, torch: str) -> None:
    """Build, install and test with each compiler that is there."""
    install_tools(session, torch)
    for compiler in COMPILERS:
        if shutil.which(compiler):
            tree = unpack_sdist(session)
            pip = [
                "python",
                "-m",
                "pip",
                "install",
                "--no-build-isolation",
                "--no-deps",
                "--force-reinstall",
                str(tree),
            ]
            session.run(*pip, env={"CXX": compiler, "MAX_JOBS": "2"})
            shutil.rmtree(tree / "squish_nf4")  # or the tests would import it
            RESULTS.mkdir(parents=True, exist_ok=True)
            name = f"{torch}-{session.python}-{compiler}"
            run_tests(session, torch, tree, RESULTS / f"{name}.xml")
            (RESULTS / f"{name}.row").write_text(row(session, tree, torch, RESULTS / f"{name}.xml"))
            print(COLUMNS, (RESULTS / f"{name}.row").read_text(), sep="\n")
    if any("| 0 |" not in path.read_text() for path in RESULTS.glob(f"{torch}-{session.python}-*.row")):
        session.error("there are failures")


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


def left_out(torch: str) -> list[str]:
    return [test for test, torches in LEFT_OUT.items() if ".".join(torch.split(".")[:2]) in torches]


def run_tests(session: nox.Session, torch: str, tree: Path, report: Path) -> None:
    files = [f"tests/test_{name}.py" for name in CORE]
    chosen = ["-k", "not (" + " or ".join(left_out(torch)) + ")"] if left_out(torch) else []
    with session.chdir(tree):
        options = ["-q", "-n", "2", "-p", "no:cacheprovider", f"--junit-xml={report}", *chosen]
        session.run("python", "-m", "pytest", *options, *files, success_codes=[0, 1])


def row(session: nox.Session, tree: Path, torch: str, report: Path) -> str:
    """One line of the table, of what the installed package says and what pytest counted."""
    says = "import squish_nf4._build_info as b, platform; print(b.TORCH_VERSION, platform.python_version(), b.COMPILER, b.CUDA_VERSION or 'no', sep=' | ')"
    with session.chdir(tree):
        built = str(session.run("python", "-c", says, silent=True)).strip().splitlines()[-1]
    suite = ElementTree.parse(report).getroot()[0]
    tests, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    counts = f"{tests - failures - errors - skipped} | {failures + errors} | {skipped} | {len(left_out(torch))}"
    return f"| {built} | {counts} |"


nox.options.sessions = ["core", "table"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
