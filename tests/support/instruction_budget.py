"""Counts the instructions that the hot loops of the vector paths spend on a weight, from the built op library.

    python -m tests.support.instruction_budget

stores today's counts in instruction_budget.json, which tests/kernels/test_instruction_budget.py compares with.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import squish_nf4
from tests.support import ROOT
from tests.support.compiling import NATIVE, compile_objects, link
from tests.support.disassembly import Function, Loop, functions
from tests.support.processes import run

STORED = Path(__file__).with_suffix(".json")
EXECUTED_PATHS = ("scalar", "avx2")
EXECUTED_FILES = ("scalar.cpp", "avx2_codec.cpp", "avx2_linear.cpp")
EXECUTED = tuple(product(EXECUTED_PATHS, ("quantize", "dequantize", "linear", "odd")))
WEIGHTS = 64 * 1024  # of tests/native/one_kernel.cpp
RUNS = int(re.findall(r"kRuns = (\d+);", (ROOT / "csrc" / "cpu" / "linear.h").read_text())[0])


class Count(NamedTuple):
    """What a loop costs."""

    per_weight: float  # instructions in one turn
    with_scales: float = 0  # the same if the turn begins by fetching scales, as it does where a group is one step
    on_stack: int = 0  # instructions of a turn that read or write a vector in the stack frame


def count(loop: Loop, weights: int, around: bool = False) -> Count:
    turn = len(loop.turn) / weights if around else 0
    return Count(round(len(loop.code) / weights, 3), round(turn, 3), loop.on_stack)


@dataclass(frozen=True)
class Codec:
    """A loop of encode_groups or decode_columns, known by an instruction that serves so many weights."""

    name: str
    function: str
    marker: str
    weights: int

    def counts(self, built: Mapping[str, Function]) -> Iterator[tuple[str, Count]]:
        """Of the innermost loop. A loop for tails, where the compiler made one, follows it."""
        if self.function in built and (loops := built[self.function].loops(self.marker)):
            loop = min(loops, key=lambda loop: (loop.blocks, loop.start, len(loop.code)))
            yield self.name, count(loop, self.weights * loop.count(self.marker))


@dataclass(frozen=True)
class Linear:
    """The loops of linear_loops.h for one type of register, told apart by their look-ups and products."""

    name: str
    registers: str
    step: int  # columns
    lookup: str
    product: str
    multiplied: int  # weights by a product

    def counts(self, built: Mapping[str, Function]) -> Iterator[tuple[str, Count]]:
        for name, function in built.items():
            if re.match(rf"(dot_products|decode_and_multiply|multiply_decoded|decode_rows)<{self.registers}\b", name):
                yield from self.counts_of_loops(function)

    def counts_of_loops(self, function: Function) -> Iterator[tuple[str, Count]]:
        """A loop that decodes takes a step of each run. The more kinds of groups it serves, the more blocks it has."""
        weights = RUNS * self.step
        for loop in function.loops(f"{self.lookup}|{self.product}"):
            products, lookups = loop.count(self.product) * self.multiplied, loop.count(self.lookup)
            if lookups == 0:
                half = RUNS * self.multiplied
                yield f"{self.name} multiply by {products // half}", count(loop, half)
            elif lookups >= 2 * RUNS:  # else it prepares a table
                doing = f"decode, multiply by {products // weights}" if products else "decode"
                groups = "" if loop.blocks == 1 else ", two groups" if loop.blocks < 10 else ", any groups"
                yield f"{self.name} {doing}{groups}", count(loop, weights, around=groups == "")


def kernels() -> Iterator[Codec | Linear]:
    floats = {"float32": "float", "bfloat16": "squish::nf4::BFloat16", "float16": "squish::nf4::Float16"}
    for path, register, lanes in [("avx2", "ymm", 8), ("avx512", "zmm", 16)]:
        kind = f"{path.capitalize()}Path"
        for dtype, name in [*floats.items(), ("float64", "double")]:
            function = f"encode_groups<{kind}, {name}>"
            sixteen_bits = path == "avx512" and dtype in ("bfloat16", "float16")  # compared as integers of 16 bits
            marker, weights = ("vpmaxuw", 2 * lanes) if sixteen_bits else ("vpmaxud", lanes)
            yield Codec(f"{path} absmax {dtype}", function, f"{marker} .*{register}", weights)
            yield Codec(f"{path} encode {dtype}", function, f"vdivps .*{register}", lanes)
    for dtype, name in floats.items():
        look_up = [(r"vpermps .*ymm", 4), (r"vpermps .*zmm", 16)]  # AVX2 looks a weight up in two halves of the table
        if dtype != "float32":
            look_up = [(r"vpshufb .*xmm", 8), (r"vpermw .*zmm", 32)]  # or in two planes of bytes
        for path, (marker, weights) in zip(("Avx2", "Avx512"), look_up, strict=True):
            for number, stores in enumerate(("", " past the caches")):
                function = f"decode_columns<{path}Path, (Stores){number}, {name}>"
                yield Codec(f"{path.lower()} decode {dtype}{stores}", function, marker, weights)
    for m in range(1, 5):  # two planes of bytes, each looked up for 32 columns
        yield Codec(f"avx2 linear int16: M={m}", f"avx2::dot_products_of_row<{m}, false>", "vpshufb .*ymm", 16)
    fma = r"vfmadd\d+ps "
    yield Linear("avx2 linear float32:", "Avx2Floats", 16, "vpermps .*ymm", fma, 8)
    yield Linear("avx512 linear float32:", "Avx512Floats", 32, "vpermps .*zmm", fma, 16)
    yield Linear("avx512_bf16 linear bfloat16:", "Avx512BFloats", 64, r"vperm(w|ps) .*zmm", "vdpbf16ps ", 32)


def measure(library: Path) -> dict[str, Count]:
    """By loop, in the order of the table."""
    built = {short_name(function.name): function for function in functions(library)}
    found: dict[str, Count] = {}
    for kernel in kernels():
        found.update(sorted(kernel.counts(built)))
    return found


def short_name(function: str) -> str:
    """``encode_groups<Avx2Path, float>``: without return type, namespaces of our own and arguments."""
    function = re.sub(r"^void |squish::cpu::|\(anonymous namespace\)::", "", function)
    return re.sub(r"\([^()]*\)$", "", function)


def executed(program: Path, path: str, what: str, folder: Path) -> float:
    """Instructions a weight of a whole kernel, from its call to its return; callgrind knows no AVX-512."""
    profile = folder / f"{path}-{what}"
    tool = ["valgrind", "--tool=callgrind", "--toggle-collect=run", f"--callgrind-out-file={profile}"]
    done = run([*tool, program, path, what])
    assert done.returncode == 0, done.stderr
    text = profile.read_text()
    assert set(re.findall(r"::(Scalar|Avx2|Avx512)", text)) == {path.capitalize()}  # that it ran, and no other
    return round(int(re.findall(r"^totals: (\d+)$", text, re.MULTILINE)[0]) / WEIGHTS, 3)


def compile_program(folder: Path) -> Path:
    sources = [NATIVE / "one_kernel.cpp", *(ROOT / "csrc" / "cpu" / name for name in EXECUTED_FILES)]
    return link(folder / "one_kernel", compile_objects(folder, sources, ["-O3"]))


def stored_loops() -> dict[str, Count]:
    return {loop: Count(**counts) for loop, counts in json.loads(STORED.read_text())["loops"].items()}


def stored_executed() -> dict[str, float]:
    return dict(json.loads(STORED.read_text())["executed"])


def main() -> None:
    """Keeps what valgrind counted where there is no valgrind."""
    loops = measure(Path(squish_nf4.library_path()))
    counted = stored_executed() if STORED.exists() else {}
    if shutil.which("valgrind"):
        with tempfile.TemporaryDirectory() as name:
            program = compile_program(Path(name))
            counted = {f"{path} {what}": executed(program, path, what, Path(name)) for path, what in EXECUTED}
    sections = [section("loops", {loop: nonzero(count) for loop, count in loops.items()}), section("executed", counted)]
    STORED.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def nonzero(count: Count) -> dict[str, float]:
    return {name: number for name, number in count._asdict().items() if number}


def section(name: str, entries: Mapping[str, object]) -> str:
    """JSON with one entry a line, so that a change is seen."""
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    return f"  {json.dumps(name)}: {{\n{lines}\n  }}"


if __name__ == "__main__":
    main()
