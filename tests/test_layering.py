"""Who may include and import whom. The arrows go down only: nf4 <- cpu, cuda <- ops, and python beside ops."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compiling import ROOT

CSRC = ROOT / "csrc"
STANDARD = r"[a-z_]+"  # <array>, <cstdint>: no path, no suffix
TORCH = r"(torch|ATen|c10)/.+"

# room -> (project rooms it may include, headers in angle brackets it may include)
ROOMS = {
    "nf4": ({"nf4"}, STANDARD),
    "cpu": ({"nf4", "cpu"}, rf"{STANDARD}|(immintrin|cpuid)\.h"),
    "c": ({"nf4", "cpu", "c"}, STANDARD + r"|stdint\.h"),
    "cuda": ({"nf4", "cuda"}, rf"{STANDARD}|cuda_runtime(_api)?\.h|cuda_(fp16|bf16)\.h"),
    "ops": ({"nf4", "cpu", "cuda", "ops"}, rf"{STANDARD}|{TORCH}"),
    "python": ({"nf4", "cpu"}, rf"{STANDARD}|pybind11/.+"),
}
PUBLIC_HEADER = "squish_nf4/include/squish_nf4/nf4.h"
NEVER = re.compile(
    r"Python\.h|torch/extension\.h|torch/csrc/(utils/pybind|Exceptions|python_headers)\.h|torch/python\.h"
)
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)

# Modules by storey: each may import those of the storeys below it, and those of its own that do not import it back.
OPERATORS = {"_version", "_build_info", "_native", "layout", "ops", "batching", "decompositions"}
LAYER = {
    "packed_weight",
    "linear",
    "packer",
    "choose",
    "model",
    "torchscript",
    "example_calls",
    "fresh_process",
    "fresh_run",
    "export_checks",
    "comparison",
    "model_state",
    "script_or_trace",
}
# Then squish_nf4.checkpoint, and on top squish_nf4.commands, which nothing but __main__ imports.
COMMAND_LINE_ONLY = {"typer", "rich", "click", "matplotlib", "sentence_transformers", "transformers"}


def native_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh"))


def includes(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of every include; the kind is ``<`` or a double quote."""
    return INCLUDE.findall(path.read_text())


@pytest.mark.parametrize("path", native_sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_native_file_includes_what_its_room_may_know(path: Path) -> None:
    rooms, outside = ROOMS[path.relative_to(CSRC).parts[0]]
    for kind, name in includes(path):
        if kind == '"':
            if name == PUBLIC_HEADER and path.name == "api.cpp":
                continue
            assert name.startswith("csrc/"), f"{name}: write the path from the repository root"
            assert (ROOT / name).is_file(), f"{name} is not a file of the project"
            assert name.split("/")[1] in rooms, f"{path.parent.name} may not know {name}"
        else:
            assert re.fullmatch(outside, name), f"{path.parent.name} may not know <{name}>"
            assert not NEVER.fullmatch(name), f"<{name}> brings Python in"


def test_public_header_needs_nothing_but_torch() -> None:
    for kind, name in includes(ROOT / PUBLIC_HEADER):
        assert kind == "<"
        assert re.fullmatch(rf"{STANDARD}|{TORCH}", name)
        assert not NEVER.fullmatch(name)


def test_every_room_has_files_and_every_file_has_a_room() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in native_sources()} == set(ROOMS)


def test_format_stands_in_headers_alone() -> None:
    assert {path.suffix for path in (CSRC / "nf4").iterdir()} == {".h"}


def test_reader_of_includes_sees_them() -> None:
    assert ('"', "csrc/cpu/bucket_index.h") in includes(CSRC / "cpu" / "avx512_codec.cpp")
    assert ("<", "torch/library.h") in includes(CSRC / "ops" / "schema.cpp")
    assert ("<", "immintrin.h") in includes(CSRC / "cpu" / "target_region.h")


def test_operators_reach_cuda_through_one_file() -> None:
    users = {path.name for path in native_sources() if ("csrc/cuda/kernels.h") in [name for _, name in includes(path)]}
    assert users == {"kernels.cu", "cuda.cpp"}


def test_schemas_stand_in_one_file() -> None:
    defining = re.compile(r"\bm\.def\(|\bTORCH_LIBRARY\(|\bTORCH_LIBRARY_FRAGMENT\(")
    found = {path.relative_to(CSRC).as_posix() for path in native_sources() if defining.search(path.read_text())}
    assert found == {"ops/schema.cpp", "python/module.cpp"}
    assert "TORCH_LIBRARY" not in (CSRC / "python" / "module.cpp").read_text()  # pybind11's functions are no operators


def modules() -> dict[str, Path]:
    """Every module of the package by its name in it: "ops", "checkpoint.convert"."""
    package = ROOT / "squish_nf4"
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}


def storey(name: str) -> set[str]:
    """The modules of a folder of the package."""
    return {module for module in modules() if module.startswith(f"{name}.")}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs: everything but the bodies of ``if TYPE_CHECKING``."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from statements(child)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside a function; "squish_nf4.x" for one of ours."""
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write the full name of the module"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # a module, or a name in one
    return found


def own_imports(path: Path) -> set[str]:
    return {name.removeprefix("squish_nf4.") for name in imports(path)} & set(modules())


def test_operators_import_neither_the_layer_nor_the_converter() -> None:
    for name in OPERATORS & set(modules()):
        assert own_imports(modules()[name]) <= OPERATORS, name


def test_layer_imports_operators_and_itself_alone() -> None:
    for name in LAYER:
        assert own_imports(modules()[name]) <= OPERATORS | LAYER, name


def test_package_imports_the_converter_only_when_it_is_used() -> None:
    tree = ast.parse(modules()["__init__"].read_text())
    always = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    ours = {name.removeprefix("squish_nf4.") for name in always if name.startswith("squish_nf4.")}
    assert ours
    assert ours <= OPERATORS | LAYER


def reachable(name: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += graph[other]
    return found


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: own_imports(path) for name, path in modules().items() if name != "__init__"}
    assert [name for name in graph if name in reachable(name, graph)] == []


def test_checkpoint_room_imports_what_stands_below_it() -> None:
    for name in storey("checkpoint"):
        assert own_imports(modules()[name]) <= OPERATORS | LAYER | storey("checkpoint"), name


def test_nothing_but_the_command_imports_the_command_line() -> None:
    commands = storey("commands")
    assert commands
    importing = {name for name, path in modules().items() if own_imports(path) & commands}
    assert importing <= commands | {"__main__"}


def test_library_imports_nothing_that_only_a_terminal_needs() -> None:
    for name in OPERATORS | LAYER | storey("checkpoint"):
        packages = {module.split(".")[0] for module in imports(modules()[name])} if name in modules() else set()
        assert not packages & COMMAND_LINE_ONLY, f"{name} imports {packages & COMMAND_LINE_ONLY}"


def test_importing_the_package_loads_nothing_but_torch_and_the_library() -> None:
    absent = {"typer", "rich", "safetensors", "zstandard", "matplotlib", "sentence_transformers", "transformers"}
    program = "import sys, squish_nf4; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "squish_nf4"} <= loaded
    assert loaded & absent == set()
