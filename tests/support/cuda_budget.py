"""Counts the machine instructions that the fast CUDA kernels spend on a weight in the library as it was built.

    python -m tests.support.cuda_budget

stores today's counts in cuda_budget.json, which tests/cuda/test_cuda_instruction_budget.py compares with.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import squish_nf4
from squish_nf4 import _build_info
from tests.support.helpers import require, required_module
from tests.support.processes import run

STORED = Path(__file__).with_suffix(".json")
ARCHITECTURES = (80, 90, 120)


class Count(NamedTuple):
    """What a kernel costs a thread."""

    per_weight: float  # machine instructions: of a turn of its loop, or of all if it has none
    registers: int
    on_stack: int = 0  # instructions that read or write local memory, where spilled registers lie


@dataclass(frozen=True)
class Line:
    address: int
    text: str

    @property
    def branch(self) -> int | None:
        """Where it jumps to."""
        match = re.search(r"\bBRA(?:\.\w+)* (?:!?\w+, )*(0x[0-9a-f]+)", self.text)
        return int(match[1], 16) if match else None

    def is_one(self, *names: str) -> bool:
        return re.match(rf"(@!?U?P\w+ )?({'|'.join(names)})\b", self.text) is not None


@dataclass(frozen=True)
class Function:
    name: str
    lines: tuple[Line, ...]
    registers: int

    def loop(self, marker: str) -> tuple[Line, ...]:
        """The shortest loop with the most instructions of that name; all lines if there is none."""
        loops = [
            tuple(inner for inner in self.lines if line.branch <= inner.address <= line.address)
            for line in self.lines
            if line.branch is not None and line.branch < line.address
        ]
        loops = [loop for loop in loops if any(line.is_one(marker) for line in loop)]
        return max(loops, key=lambda loop: (count(loop, marker), -len(loop)), default=self.lines)

    def count(self, lines: tuple[Line, ...], weights: float) -> Count:
        instructions = sum(not line.is_one("NOP") for line in lines)
        return Count(round(instructions / weights, 2), self.registers, count(lines, "LDL", "STL"))


def count(lines: tuple[Line, ...], *names: str) -> int:
    return sum(line.is_one(*names) for line in lines)


def disassembler() -> str:
    """cuobjdump: on the PATH, or the one that comes with triton."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    triton = Path(required_module("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    require("cuobjdump", triton.exists(), "there is no cuobjdump on the PATH, and triton has none")
    return str(triton)


def disassembled(architecture: int) -> dict[str, Function]:
    """All kernels of the library, by their names as a person would write them: "quantize_octets<8, 2, float>"."""
    built_by = _build_info.CUDA_VERSION
    require("nvcc-13.0", built_by == "13.0", f"the stored counts are of CUDA 13.0, and the library's is {built_by}")
    cuobjdump, library = [disassembler(), "-arch", f"sm_{architecture}"], squish_nf4.library_path()
    used = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", run([*cuobjdump, "-res-usage", library]).stdout))
    require("nvcc-13.0", bool(used), f"the library was built without sm_{architecture} (TORCH_CUDA_ARCH_LIST)")
    names = dict(zip(used, plain_names(list(used)), strict=True))
    return {
        names[mangled]: Function(names[mangled], tuple(lines_of(body)), int(used[mangled]))
        for mangled, body in functions_of(run([*cuobjdump, "-sass", library]).stdout)
    }


def functions_of(listing: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"\n\s*Function : (\S+)\n", listing)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def lines_of(body: str) -> Iterator[Line]:
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", body):
        yield Line(int(address, 16), text.strip())


def plain_names(mangled: list[str]) -> list[str]:
    return [plain_name(name) for name in run(["c++filt", *mangled]).stdout.splitlines()]


def plain_name(name: str) -> str:
    name = name.replace("squish::cuda::(anonymous namespace)::", "").replace("squish::nf4::", "")
    name = re.sub(r"\((int|bool)\)", "", name.removeprefix("void "))
    return name.split(">(")[0] + ">"


def measure(built: Mapping[str, Function]) -> dict[str, Count]:
    """The kernels that most calls use: group size 64, and each number of tiles of the product."""
    counts = {}
    for dtype, steps in (("float", 2), ("BFloat16", 4), ("Float16", 4)):
        kernel = built[f"quantize_octets<8, {steps}, {dtype}>"]
        counts[f"quantize {dtype}"] = kernel.count(kernel.loop("SHFL"), 8 * steps)
    for dtype, columns in (("float", 4), ("BFloat16", 8), ("Float16", 8)):
        kernel = built[f"dequantize_vectors<2, true, {dtype}>"]
        counts[f"dequantize {dtype}"] = kernel.count(kernel.lines, 2 * columns)
    for tiles, arranged in ((1, "false"), (2, "false"), (2, "true"), (4, "true"), (8, "true")):
        kernel = built[f"multiply_few<2, {tiles}, {arranged}, BFloat16>"]
        loop = kernel.loop("HMMA")
        weights = count(loop, "HMMA") / tiles * 8  # each is of 16 x 16 weights, for 32 lanes
        counts[f"linear, {tiles} tiles{', arranged' if arranged == 'true' else ''}"] = kernel.count(loop, weights)
    for activations in (1, 8):
        kernel = built[f"multiply_plain<{activations}, true, float>"]
        # Of a stretch a lane takes two words of eight columns in four rows.
        counts[f"linear without tensor cores, {activations}"] = kernel.count(kernel.loop("FFMA"), 2 * 8 * 4)
    return counts


def stored() -> dict[str, dict[str, Count]]:
    return {name: {k: Count(*v) for k, v in counts.items()} for name, counts in json.loads(STORED.read_text()).items()}


def main() -> None:
    found = {f"sm_{number}": measure(disassembled(number)) for number in ARCHITECTURES}
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    for name, counts in found.items():
        for kernel, cost in counts.items():
            print(f"{name} {kernel}: {cost}")


if __name__ == "__main__":
    main()
