"""Runs the blocks of a launch, thousands of threads at once: a lane of numpy's arrays is a thread.

A lane has a place among the basic blocks of its kernel; the lowest place goes first, with all lanes that are there, and
so the ways of a branch come together again. At an instruction where lanes meet (a shuffle, a product of matrices, a
barrier), those who came wait until their warp or their block is complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.support.ptx.memory import (
    UNSIGNED,
    Array,
    KernelError,
    Local,
    Memory,
    Shared,
    distinct_bytes,
    refuse_misaligned,
    turns_of_banks,
)
from tests.support.ptx.operations import WARP, Step, step_of
from tests.support.ptx.parser import Function, Instruction, Module, Symbol, Variable

NOWHERE = np.int32(2**31 - 1)
MEET = {"shfl": "warp", "mma": "warp", "bar": "block"}  # where lanes wait for each other
ENDS = {"bra", "ret", "exit"}
MOST_PASSES = 1_000_000  # of basic blocks: the longest of our tests needs a hundredth of it


@dataclass
class BasicBlock:
    steps: list[tuple[Instruction, Step]] = field(default_factory=list)
    end: Instruction | None = None  # a branch, or the end of the thread
    meet: str = ""  # or one step, for which the lanes of a "warp" or a "block" wait
    target: int = 0  # of the branch


class Kernel:
    """A function of a module, ready to run."""

    def __init__(self, module: Module, function: Function, addresses: dict[str, int]) -> None:
        self.name = function.name
        self.registers = function.registers
        self.parameters = function.parameters
        self.most_threads = function.most_threads
        self._addresses = dict(addresses)
        own = [variable for variable in function.variables if variable.space == "shared"]
        dynamic = [variable for variable in module.variables if variable.space == "shared"]
        self.shared_size = self._place([*own, *dynamic])
        self.local_size = self._place([variable for variable in function.variables if variable.space == "local"])
        self.blocks = self._basic_blocks(function)

    def _place(self, variables: list[Variable]) -> int:
        """Puts variables one behind the other, and returns their size; an array of no stated size is the last."""
        end = 0
        for variable in variables:
            end = -(-end // variable.align) * variable.align
            self._addresses[variable.name] = end
            end += variable.size
        return end

    def address_of(self, name: str) -> int:
        return self._addresses[name]

    def _basic_blocks(self, function: Function) -> list[BasicBlock]:
        blocks, labels = [BasicBlock()], {}
        for item in function.body:
            if isinstance(item, str):
                if blocks[-1].steps or blocks[-1].end or blocks[-1].meet:
                    blocks.append(BasicBlock())
                labels[item] = len(blocks) - 1
                continue
            kind = item.words[0]
            if blocks[-1].end or blocks[-1].meet or (kind in MEET and blocks[-1].steps):
                blocks.append(BasicBlock())
            if kind in ENDS:
                blocks[-1].end = item
            else:
                if kind in MEET and item.guard:
                    raise NotImplementedError(f"{self.name}: lanes meet in a guarded instruction: {item.text}")
                blocks[-1].meet = MEET.get(kind, "")
                blocks[-1].steps.append((item, guarded(item, step_of(self, item))))
        blocks.append(BasicBlock(end=Instruction("ret", ())))  # of a body that ends in a label
        for block in blocks:
            if block.end is not None and block.end.words[0] == "bra":
                target = block.end.operands[0]
                if not isinstance(target, Symbol):
                    raise NotImplementedError(f"{self.name}: {block.end.text}")
                block.target = labels[target.name]
        return blocks


def guarded(instruction: Instruction, step: Step) -> Step:
    if not instruction.guard:
        return step

    def run(machine: Machine) -> None:
        outer = machine.mask
        machine.set_mask(machine.where_guard_holds(instruction))
        if machine.active().size:
            step(machine)
        machine.set_mask(outer)

    return run


@dataclass
class Costs:
    """What a kernel asked of memory, by instruction."""

    sectors: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    banks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def note(self, instruction: Instruction, space: str, addresses: Array, lanes: Array, size: int) -> None:
        text = instruction.text.split(" ", 1)[1] if instruction.guard else instruction.text
        if space == "global":
            warps = lanes // WARP
            entry = self.sectors[text]
            asked, moved = distinct_bytes(addresses, warps, size), distinct_bytes(addresses, warps, 32)
        elif space == "shared":
            entry = self.banks[text]
            asked, moved = turns_of_banks(addresses, lanes, size)
        else:
            return
        entry[0] += asked
        entry[1] += moved

    def sector_efficiency(self, kind: str = "") -> float:
        """Bytes that were wanted, of the bytes of the sectors that moved; kind: "ld", "st" or both."""
        entries = [entry for text, entry in self.sectors.items() if text.startswith(kind)]
        return sum(asked for asked, _ in entries) / max(sum(moved for _, moved in entries), 1)

    def turns(self, kind: str) -> float:
        """Turns of the banks of shared memory for one access: 1 without conflicts."""
        entries = [entry for text, entry in self.banks.items() if text.startswith(kind)]
        return sum(turns for _, turns in entries) / sum(asked for asked, _ in entries)


Size3 = tuple[int, int, int]


def launch(
    kernel: Kernel,
    memory: Memory,
    grid: Size3,
    block: Size3,
    arguments: dict[str, bytes],
    *,
    dynamic_shared: int = 0,
    costs: Costs | None = None,
    lanes_at_once: int = 1 << 15,
    only: Sequence[int] | None = None,
) -> None:
    """Runs all blocks of a launch, or ``only`` some; a KernelError names kernel, block, thread and instruction."""
    threads = block[0] * block[1] * block[2]
    if threads % WARP:
        raise NotImplementedError(f"{kernel.name}: a block of {threads} threads, which are no whole warps")
    if threads > kernel.most_threads:
        raise KernelError(
            f"{kernel.name}: {threads} threads a block, where the kernel is compiled for {kernel.most_threads}"
        )
    memory.begin_launch()
    blocks = range(grid[0] * grid[1] * grid[2]) if only is None else only
    at_once = max(1, lanes_at_once // threads)
    for first in range(0, len(blocks), at_once):
        numbers = np.array(blocks[first : first + at_once])
        machine = Machine(kernel, memory, numbers, grid, block, arguments, kernel.shared_size + dynamic_shared, costs)
        with np.errstate(all="ignore"):
            machine.run()


class Machine:
    """Some blocks of a launch, and their threads."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        numbers: Array,
        grid: Size3,
        block: Size3,
        arguments: dict[str, bytes],
        shared: int,
        costs: Costs | None,
    ) -> None:
        self.kernel, self.memory, self.parameters, self.costs = kernel, memory, arguments, costs
        self.threads = block[0] * block[1] * block[2]
        self.lanes = len(numbers) * self.threads
        self.everyone = np.arange(self.lanes)
        self.block_of = self.everyone // self.threads
        self.numbers = numbers
        self.shared = Shared(len(numbers), shared)
        self.local = Local(self.lanes, kernel.local_size)
        self.place = np.zeros(self.lanes, np.int32)  # among the basic blocks
        self.waits = np.zeros(self.lanes, bool)
        self.gone = np.zeros(self.lanes, bool)
        self.mask: Array | None = None  # the lanes that run; None: all
        self._active: Array | None = None
        # What nobody has written is NaN, whichever type it is taken for.
        self.registers: dict[str, Array] = {
            name: np.zeros(1, bool) if size == 1 else np.full(1, 2 ** (8 * size) - 1, UNSIGNED[size])
            for name, size in kernel.registers.items()
        }
        self._special = {"%ntid": block, "%nctaid": grid}
        self._sizes = {"%tid": block, "%ctaid": grid}

    # --- Values of lanes --------------------------------------------------------------------------------------------

    def special(self, name: str) -> Array:
        """%tid.x and the like."""
        kind, _, axis = name.partition(".")
        if kind == "%laneid":
            return (self.everyone % WARP).astype(np.uint32)
        if kind in self._special:
            return np.array([self._special[kind]["xyz".index(axis)]], np.uint32)
        number = self.everyone % self.threads if kind == "%tid" else self.numbers[self.block_of]
        x, y, _ = self._sizes[kind]
        return {"x": number % x, "y": number // x % y, "z": number // (x * y)}[axis].astype(np.uint32)

    def put(self, name: str, value: Array) -> None:
        """Into a register of the lanes that run."""
        self.registers[name] = value if self.mask is None else np.where(self.mask, value, self.registers[name])

    def full(self, value: Array) -> Array:
        """One value a lane: what is the same for all may be kept once."""
        return value if value.shape[0] == self.lanes else np.broadcast_to(value, (self.lanes,))

    def active(self) -> Array:
        """The lanes that run, by number."""
        if self.mask is None:
            return self.everyone
        if self._active is None:
            self._active = np.flatnonzero(self.mask)
        return self._active

    def of_active(self, value: Array) -> Array:
        return self.full(value) if self.mask is None else self.full(value)[self.active()]

    def spread(self, value: Array) -> Array:
        """Values of the lanes that run, at their places among all."""
        if self.mask is None:
            return value
        result = np.zeros(self.lanes, value.dtype)
        result[self.active()] = value
        return result

    def set_mask(self, mask: Array | None) -> None:
        self.mask, self._active = mask, None

    def where_guard_holds(self, instruction: Instruction) -> Array:
        """Of the lanes that run, those for which a guarded instruction is."""
        holds = self.full(self.registers[instruction.guard]) != instruction.negated
        return holds if self.mask is None else holds & self.mask

    # --- Memory -----------------------------------------------------------------------------------------------------

    def load(self, instruction: Instruction, space: str, addresses: Array, size: int, count: int) -> list[Array]:
        """``count`` neighbouring elements for every lane that runs."""
        self._note(instruction, space, addresses, size * count)
        lanes = self.active()
        places = [addresses + np.uint64(k * size) for k in range(count)]
        if space == "local":
            return [self.local.load(lanes, at, size) for at in places]
        if space != "shared":
            return [self.memory.load(at, size) for at in places]
        if size != 4:
            raise NotImplementedError(f"words of shared memory in parts: {instruction.text}")
        return [self.shared.load(self.block_of[lanes], lanes, at) for at in places]

    def store(
        self, instruction: Instruction, space: str, addresses: Array, values: list[Array], copied: bool = False
    ) -> None:
        size = values[0].dtype.itemsize
        self._note(instruction, space, addresses, size * len(values))
        lanes = self.active()
        for k, value in enumerate(values):
            at = addresses + np.uint64(k * size)
            if space == "local":
                self.local.store(lanes, at, value)
            elif space == "global":
                self.memory.store(at, value)
            elif size != 4:
                raise NotImplementedError(f"words of shared memory in parts: {instruction.text}")
            else:
                self.shared.store(self.block_of[lanes], lanes, at, value, copied)

    def _note(self, instruction: Instruction, space: str, addresses: Array, size: int) -> None:
        refuse_misaligned(addresses, size)
        if self.costs is not None:
            self.costs.note(instruction, space, addresses, self.active(), size)

    def pass_barrier(self) -> None:
        self.shared.pass_barrier(np.unique(self.block_of[self.active()]))

    # --- Running ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for _ in range(MOST_PASSES):
            places = np.where(self.waits | self.gone, NOWHERE, self.place)
            at = int(places.min())
            if at == NOWHERE:
                break
            block = self.kernel.blocks[at]
            here = places == at
            if block.meet:
                here = self._complete(block.meet, at, here)
                if not here.any():
                    continue
            self.set_mask(None if here.all() else here)
            for instruction, step in block.steps:
                try:
                    step(self)
                except KernelError as fault:
                    raise KernelError(
                        f"{self.kernel.name}: {self._describe(fault.lane)}: {fault}: {instruction.text}"
                    ) from None
            self._leave(block, at, here)
        else:
            raise KernelError(f"{self.kernel.name}: has not ended after {MOST_PASSES} basic blocks")
        if not self.gone.all():
            lane = int(np.argmax(self.waits))
            text = self.kernel.blocks[int(self.place[lane])].steps[0][0].text
            what = "waits for threads that never come"
            raise KernelError(f"{self.kernel.name}: {self._describe_lane(lane)} {what}: {text}")

    def _complete(self, group: str, at: int, here: Array) -> Array:
        """Those of the lanes that came to a meeting, now or before, whose warp or block is complete. The rest waits."""
        here = here | (self.waits & (self.place == at))
        rows = here.reshape(-1, WARP if group == "warp" else self.threads)
        complete = np.repeat(rows.all(axis=1), rows.shape[1])
        self.waits[here] = ~complete[here]
        return here & complete

    def _leave(self, block: BasicBlock, at: int, here: Array) -> None:
        end = block.end
        taken = here
        if end is not None and end.guard:
            taken = self.where_guard_holds(end)
        self.place[here] = at + 1
        if end is not None and end.words[0] == "bra":
            self.place[taken] = block.target
        elif end is not None:
            self.gone |= taken

    def _describe(self, number: int) -> str:
        active = self.active()
        return self._describe_lane(int(active[min(number, active.size - 1)]))

    def _describe_lane(self, lane: int) -> str:
        return f"thread {lane % self.threads} of block {int(self.numbers[self.block_of[lane]])}"
