"""The machine code of a binary, as objdump prints it, and the loops of its functions."""

from __future__ import annotations

import heapq
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from tests.support.helpers import require
from tests.support.processes import run

JUMP = re.compile(r"(?:bnd )?j\w+ +([0-9a-f]+) ")
NOTHING_FOLLOWS = re.compile(r"(?:notrack |bnd )*(?:jmp|ret|ud2|hlt)\b")
FRAME = re.compile(r"mov +%rsp,%rbp$")
VECTOR_ON_STACK = {False: re.compile(r"(?=.*%[xyz]mm).*\(%rsp"), True: re.compile(r"(?=.*%[xyz]mm).*\(%r[sb]p")}


class Instruction(NamedTuple):
    function: str
    address: int
    code: str  # bytes, each as two hexadecimal digits and a space
    text: str


def require_x86_disassembler() -> None:
    require("x86-64", platform.machine() == "x86_64", f"this is {platform.machine()}")
    require("binutils", shutil.which("objdump") is not None, "objdump is not installed")


def machine_code(binary: Path) -> Iterator[Instruction]:
    """Every instruction of an object or library."""
    function = ""
    command = ["objdump", "--disassemble", "--demangle", "--insn-width=16", str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(">:\n"):
                function = line.strip()[:-2].split(" <", 1)[1]
            elif line.startswith(" ") and "\t" in line:
                address, code, *text = line.strip().split("\t")
                yield Instruction(function, int(address[:-1], 16), code, text[0] if text else "")
    assert process.returncode == 0


def compilers(binary: Path) -> list[str]:
    """What each compiler of the binary's parts says of itself."""
    printed = run(["readelf", "--string-dump=.comment", binary]).stdout
    return re.findall(r"^ +\[ *[0-9a-f]+\] +(.+)$", printed, re.MULTILINE)


class Loop(NamedTuple):
    """A way through a function's code that comes back to where it began."""

    start: int
    blocks: int
    code: tuple[str, ...]
    turn: tuple[str, ...]  # one turn of the loop around it that passes once through this one; empty if there is none
    on_stack: int  # instructions of `code` that read or write a vector in the function's frame

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, text) is not None for text in self.code)


class Function:
    """Straight stretches of code, by their first addresses, and which of them may follow which."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.name = instructions[0].function
        self.has_frame = any(FRAME.match(instruction.text) for instruction in instructions)
        targets = {int(jump[1], 16) for i in instructions if (jump := JUMP.match(i.text))}
        starts = targets | {after.address for before, after in pairwise(instructions) if ends_block(before.text)}
        self.blocks: dict[int, list[str]] = {}
        block: list[str] = []
        for instruction in instructions:
            if not self.blocks or instruction.address in starts:
                block = self.blocks[instruction.address] = []
            block.append(instruction.text)
        self.followers = {start: self._followers(start, after) for start, after in pairwise([*self.blocks, -1])}

    def _followers(self, start: int, after: int) -> list[int]:
        last = self.blocks[start][-1]
        jump = JUMP.match(last)
        found = [int(jump[1], 16)] if jump else []
        if not NOTHING_FOLLOWS.match(last):
            found.append(after)
        return [follower for follower in found if follower in self.blocks]

    def loops(self, pattern: str) -> list[Loop]:
        """The innermost loops around the instructions that match, each once, by their addresses."""
        found = {}
        for start, block in self.blocks.items():
            if any(re.match(pattern, text) for text in block) and (cycle := self._shortest_cycle(start)):
                found[frozenset(cycle)] = self._loop(start, cycle)
        return sorted(found.values(), key=lambda loop: loop.start)

    def _loop(self, start: int, cycle: Sequence[int]) -> Loop:
        inside = set(cycle)
        entries = {to for block, to_all in self.followers.items() if block not in inside for to in to_all} & inside
        back = next((edge for edge in pairwise([*cycle, start]) if edge[1] in entries), None)
        code = self._code(cycle)
        on_stack = sum(VECTOR_ON_STACK[self.has_frame].match(text) is not None for text in code)
        turn = self._code(self._shortest_cycle(start, without=back))
        return Loop(min(cycle), len(cycle), code, turn, on_stack)

    def _code(self, blocks: Sequence[int]) -> tuple[str, ...]:
        return tuple(text for block in blocks for text in self.blocks[block])

    def _shortest_cycle(self, start: int, without: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The blocks on the way from one back to itself that executes the fewest instructions (Dijkstra)."""
        queue: list[tuple[int, tuple[int, ...]]] = [(len(self.blocks[start]), (start,))]
        done = set()
        while queue:
            length, way = heapq.heappop(queue)
            if way[-1] in done:
                continue
            done.add(way[-1])
            for follower in self.followers[way[-1]]:
                if (way[-1], follower) == without:
                    continue
                if follower == start:
                    return way
                heapq.heappush(queue, (length + len(self.blocks[follower]), (*way, follower)))
        return ()


def ends_block(text: str) -> bool:
    return JUMP.match(text) is not None or NOTHING_FOLLOWS.match(text) is not None


def functions(binary: Path) -> Iterator[Function]:
    for _, instructions in groupby(machine_code(binary), key=lambda instruction: instruction.function):
        yield Function(list(instructions))
