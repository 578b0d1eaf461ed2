"""Who may include and import whom. The arrows go down only: nf4 <- cpu, cuda <- ops, and python beside ops."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import run_python

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

# Room of the package -> the rooms that it may import. A module belongs to the longest name that it begins with; the
# modules of one room may import each other, but not in a circle.
PACKAGE_ROOMS: dict[str, set[str]] = {
    "operators": set(),  # the modules of OPERATORS
    "nn": {"operators"},
    "model": {"operators", "nn", "model.source_scan"},
    "model.source_scan": set(),
    "torchscript": {"operators", "nn"},
    "checkpoint": {"operators"},  # the ground: values, files, resources, messages
    "checkpoint.source": {"operators", "checkpoint"},
    "checkpoint.directory": {"operators", "checkpoint"},
    "checkpoint.conversion": {"operators", "checkpoint", "checkpoint.source", "checkpoint.directory"},
    "checkpoint.loading": {"operators", "nn", "model", "checkpoint", "checkpoint.directory"},
    "checkpoint.audit": {"operators", "checkpoint", "checkpoint.source", "checkpoint.directory"},
    "integrations": {"operators", "nn", "model", "torchscript"},
    "doctor": {"operators"},
    "commands": {  # the top: all that stands below
        *("operators", "nn", "model", "torchscript", "integrations", "doctor", "checkpoint", "checkpoint.source"),
        *("checkpoint.directory", "checkpoint.conversion", "checkpoint.loading", "checkpoint.audit"),
    },
}
OPERATORS = {"_version", "_build_info", "_native", "_C", "layout", "replace", "ops", "vmap", "flops", "decompositions"}
FACE = {"__init__", "checkpoint.__init__"}  # what they import is imported when it is asked for, or is all below
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


def test_operators_reach_cuda_through_files_of_its_name() -> None:
    users = [path for path in native_sources() if any(name.startswith("csrc/cuda/") for _, name in includes(path))]
    outside = {path.name for path in users if path.parent.name != "cuda"}
    assert outside
    assert all(name.startswith("cuda_") for name in outside), outside


def test_schemas_stand_in_one_file() -> None:
    defining = re.compile(r"\bm\.def\(|\bTORCH_LIBRARY\(|\bTORCH_LIBRARY_FRAGMENT\(")
    found = {path.relative_to(CSRC).as_posix() for path in native_sources() if defining.search(path.read_text())}
    assert found == {"ops/schema.cpp", "python/module.cpp"}
    assert "TORCH_LIBRARY" not in (CSRC / "python" / "module.cpp").read_text()  # pybind11's functions are no operators


def modules() -> dict[str, Path]:
    """Every module of the package by its name in it: "ops", "checkpoint.conversion.convert", "nn.__init__"."""
    package = ROOT / "squish_nf4"
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}


def room_of(module: str) -> str:
    if module in OPERATORS:
        return "operators"
    return max((room for room in PACKAGE_ROOMS if module.startswith(f"{room}.")), key=len)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write the full name of the module"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # a module, or a name in one
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports; a package that lends a name is its __init__."""
    known = {*modules(), *OPERATORS}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "squish_nf4"]
            found |= {name.removeprefix("squish_nf4").lstrip(".") or "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "squish_nf4":
            place = str(node.module).removeprefix("squish_nf4").lstrip(".")
            for alias in node.names:
                module = f"{place}.{alias.name}" if place else alias.name
                if module in known:
                    found.add(module)
                elif place in known:
                    found.add(place)
                else:
                    found.add(f"{place}.__init__" if place else "__init__")
    return found


INSIDE = sorted(set(modules()) - FACE - {"__main__"})


def test_every_module_has_a_room_and_every_room_has_modules() -> None:
    assert {room_of(module) for module in INSIDE} == set(PACKAGE_ROOMS)
    assert {room for rooms in PACKAGE_ROOMS.values() for room in rooms} <= set(PACKAGE_ROOMS)


@pytest.mark.parametrize("module", INSIDE)
def test_module_imports_what_its_room_may_know(module: str) -> None:
    room = room_of(module)
    unknown = {
        other
        for other in own_imports(modules()[module])
        if other in FACE or other == "__main__" or room_of(other) not in {room, *PACKAGE_ROOMS[room]}
    }
    assert unknown == set(), f"{room} may not know {unknown}"


def test_rooms_stand_on_each_other_and_not_in_a_circle() -> None:
    assert [room for room in PACKAGE_ROOMS if room in reachable(room, PACKAGE_ROOMS)] == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: own_imports(path) & set(modules()) for name, path in modules().items() if name not in FACE}
    graph = {name: others - FACE for name, others in graph.items()}
    assert [name for name in graph if name in reachable(name, graph)] == []


def reachable(name: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += graph[other]
    return found


def test_package_imports_the_converter_only_when_it_is_used() -> None:
    tree = ast.parse(modules()["__init__"].read_text())
    always = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    ours = {name.removeprefix("squish_nf4.") for name in always if name.startswith("squish_nf4.")}
    assert ours
    assert {room_of(name) for name in ours} <= {"operators", "nn", "model"}


def test_library_imports_nothing_that_only_a_terminal_needs() -> None:
    for name in INSIDE:
        if room_of(name) not in ("commands", "integrations"):
            packages = {module.split(".")[0] for module in imports(modules()[name])}
            assert not packages & COMMAND_LINE_ONLY, f"{name} imports {packages & COMMAND_LINE_ONLY}"


def test_reader_of_imports_sees_them(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import squish_nf4.model.quantize\nfrom squish_nf4 import _C, convert, ops\n"
        "from squish_nf4.checkpoint import values\n"
        "if TYPE_CHECKING:\n    from squish_nf4.nn.linear import NF4Linear\n"
        "def f():\n    from squish_nf4.checkpoint import convert\n"
    )
    assert own_imports(file) == {
        "model.quantize",
        "_C",
        "ops",
        "checkpoint.values",
        "nn.linear",
        "checkpoint.__init__",
        "__init__",
    }


def test_importing_the_package_loads_nothing_but_torch_and_the_library() -> None:
    absent = {"typer", "rich", "safetensors", "zstandard", "matplotlib", "sentence_transformers", "transformers"}
    program = "import sys, squish_nf4; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run_python(program).split())
    assert {"torch", "squish_nf4"} <= loaded
    assert loaded & absent == set()
