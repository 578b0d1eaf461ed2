"""Global, shared and local memory of a launch. Every access is checked, and the first bad one is a KernelError."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xA5  # of bytes that nobody has written: a kernel that takes them for values computes nonsense


class KernelError(Exception):
    """What a kernel did that no kernel may do."""

    def __init__(self, what: str, lane: int = 0) -> None:
        super().__init__(what)
        self.lane = lane  # which of the lanes of the access


def refuse(bad: Array, what: str, addresses: Array) -> None:
    """A KernelError if any lane's access is bad."""
    if bad.any():
        lane = int(np.argmax(bad))
        raise KernelError(f"{what}, at {int(addresses[lane]):#x}", lane)


def refuse_misaligned(addresses: Array, size: int) -> None:
    refuse(addresses % np.uint64(size) != 0, f"an access of {size} bytes that is not aligned to them", addresses)


class Buffer:
    """A piece of global memory that a test made; what is there of its content lies at ``place``."""

    def __init__(self, memory: Memory, address: int, place: slice) -> None:
        self.memory, self.address, self.place = memory, address, place

    def bytes(self) -> Array:
        """A copy of the content. KernelError if the kernels left a byte unwritten."""
        missing = int((self.memory.state[self.place] & Memory.READABLE == 0).sum())
        if missing:
            raise KernelError(f"{missing} of {self.place.stop - self.place.start} bytes of a result were not written")
        return self.memory.content[self.place].copy()


class Memory:
    """Global memory: buffers with gaps between them, in which nobody has business."""

    BASE = 0x7F00_0000_0000
    GAP = 512
    READABLE, WRITABLE, TOUCHED = 1, 2, 4  # of each byte; touched: written by the launch that runs

    def __init__(self) -> None:
        self.content = np.full(1 << 16, POISON, np.uint8)
        self.state = np.zeros(1 << 16, np.uint8)
        self.end = self.GAP
        self.next_address = self.BASE
        self.starts = np.zeros(0, np.uint64)  # the address of each buffer's content, ascending
        self.places = np.zeros(0, np.uint64)  # where it lies in self.content
        self.sizes = np.zeros(0, np.uint64)

    def upload(self, data: Array, skew: int = 0, readable: Array | None = None) -> Buffer:
        """An input, which kernels may read. It starts ``skew`` bytes past an alignment of 256.

        readable: for each byte, whether it belongs to the input; the others are out of bounds.
        """
        buffer = self._allocate(data.nbytes, skew, self.READABLE)
        self.content[buffer.place] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if readable is not None:
            self.state[buffer.place] = np.where(readable, self.READABLE, 0)
        return buffer

    def empty(self, size: int, skew: int = 0) -> Buffer:
        """An output, or scratch: kernels may write it, and read what they wrote."""
        return self._allocate(size, skew, self.WRITABLE)

    def part_of_input(self, size: int, first: int, data: Array) -> Buffer:
        """An input of any size, of which only the bytes from ``first`` on are there, as many as ``data`` has."""
        buffer = self._allocate(data.nbytes, 0, self.READABLE, size, first)
        self.content[buffer.place] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return buffer

    def part_of_output(self, size: int, first: int, count: int) -> Buffer:
        """An output of any size, of which only ``count`` bytes from ``first`` on are there."""
        return self._allocate(count, 0, self.WRITABLE, size, first)

    def _allocate(self, count: int, skew: int, state: int, size: int = 0, first: int = 0) -> Buffer:
        place = -(-self.end // 256) * 256 + (skew + first) % 256
        self.end = place + count + self.GAP
        while self.end > self.content.size:
            self.content = np.concatenate([self.content, np.full(self.content.size, POISON, np.uint8)])
            self.state = np.concatenate([self.state, np.zeros(self.state.size, np.uint8)])
        self.state[place : place + count] = state
        address = self.next_address + skew
        self.next_address = -(-(address + max(size, count) + self.GAP) // 256) * 256
        self.starts = np.append(self.starts, np.uint64(address + first))
        self.places = np.append(self.places, np.uint64(place))
        self.sizes = np.append(self.sizes, np.uint64(count))
        return Buffer(self, address, slice(place, place + count))

    def begin_launch(self) -> None:
        self.state &= self.READABLE | self.WRITABLE

    def _elements(self, addresses: Array, size: int) -> Array:
        """The numbers of the elements of ``size`` bytes at some addresses, once it is known that they are there."""
        refuse_misaligned(addresses, size)
        buffer = np.searchsorted(self.starts, addresses, side="right") - 1  # -1 is the last one, which lies far above
        within = addresses - self.starts[buffer]
        refuse(within + np.uint64(size) > self.sizes[buffer], "an access out of bounds", addresses)
        return ((self.places[buffer] + within) // np.uint64(size)).astype(np.int64)

    def load(self, addresses: Array, size: int) -> Array:
        """One element of ``size`` bytes for every lane."""
        at = self._elements(addresses, size)
        unsigned = UNSIGNED[size]
        state = self.state.view(unsigned)[at]
        readable = unsigned(int.from_bytes(bytes([self.READABLE]) * size, "little"))
        if (state & readable != readable).any():
            refuse(state == 0, "an access out of bounds", addresses)
            refuse(state & readable != readable, "a load of what nobody has written", addresses)
        touched = unsigned(int.from_bytes(bytes([self.TOUCHED]) * size, "little"))
        refuse(state & touched != 0, "a load of what the same launch writes", addresses)
        return self.content.view(unsigned)[at]

    def store(self, addresses: Array, values: Array) -> None:
        size = values.dtype.itemsize
        at = self._elements(addresses, size)
        unsigned = UNSIGNED[size]
        content, states = self.content.view(unsigned), self.state.view(unsigned)
        state = states[at]
        writable, touched = (
            unsigned(int.from_bytes(bytes([flag]) * size, "little")) for flag in (self.WRITABLE, self.TOUCHED)
        )
        refuse(state & writable != writable, "a store to an input", addresses)
        of_touched_bytes = (state & touched) // unsigned(self.TOUCHED) * unsigned(255)
        refuse((content[at] ^ values) & of_touched_bytes != 0, "two values for one place", addresses)
        content[at] = values
        refuse(content[at] != values, "two values for one place", addresses)
        states[at] = state | touched | (touched // unsigned(self.TOUCHED // self.READABLE))


class Shared:
    """Shared memory of some blocks, in words of four bytes: what a thread writes, others see after the next barrier."""

    SEVERAL = -2

    def __init__(self, blocks: int, size: int) -> None:
        self.words = -(-size // 4)
        count = blocks * self.words
        self.size = size
        self.content = np.full(count, POISON * 0x01010101, np.uint32)
        self.writer = np.full(count, -1, np.int64)
        self.reader = np.full(count, -1, np.int64)
        self.written = np.full(count, -1, np.int64)  # when: between which barriers of its block
        self.read = np.full(count, -1, np.int64)
        self.copied = np.zeros(count, bool)  # by an asynchronous copy that nobody has waited for
        self.time = np.zeros(blocks, np.int64)  # of each block: the barriers it has passed

    def _words(self, blocks: Array, addresses: Array) -> Array:
        refuse_misaligned(addresses, 4)
        refuse(addresses + np.uint64(4) > np.uint64(self.size), "an access out of bounds in shared memory", addresses)
        return blocks * self.words + (addresses // np.uint64(4)).astype(np.int64)

    def load(self, blocks: Array, lanes: Array, addresses: Array) -> Array:
        at = self._words(blocks, addresses)
        now = self.time[blocks]
        refuse(self.copied[at], "a load of what an asynchronous copy may not have brought yet", addresses)
        refuse(self.written[at] < 0, "a load of shared memory that nobody has written", addresses)
        race = (self.written[at] == now) & (self.writer[at] != lanes)
        refuse(race, "a load of what another thread wrote, and no barrier between", addresses)
        several = (self.read[at] == now) & (self.reader[at] != lanes)
        self.reader[at], self.read[at] = lanes, now
        self.reader[at[several | (self.reader[at] != lanes)]] = self.SEVERAL
        return self.content[at]

    def store(self, blocks: Array, lanes: Array, addresses: Array, values: Array, copied: bool = False) -> None:
        at = self._words(blocks, addresses)
        now = self.time[blocks]
        race = (self.written[at] == now) & (self.writer[at] != lanes)
        race |= (self.read[at] == now) & (self.reader[at] != lanes)
        refuse(race, "a store where another thread wrote or read, and no barrier between", addresses)
        refuse(self.copied[at], "a store where an asynchronous copy is under way", addresses)
        self.content[at], self.writer[at], self.written[at], self.copied[at] = values, lanes, now, copied
        refuse(self.writer[at] != lanes, "two threads store to one place in shared memory", addresses)

    def wait(self, lanes: Array) -> None:
        """The copies of these threads are done: now, so that others see them after the next barrier."""
        at = np.flatnonzero(self.copied & np.isin(self.writer, lanes))
        self.written[at] = self.time[at // self.words]
        self.copied[at] = False

    def pass_barrier(self, blocks: Array) -> None:
        self.time[blocks] += 1


class Local:
    """An array of every thread's own."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = -(-size // 8) * 8
        self.content = np.full(lanes * self.size, POISON, np.uint8)
        self.written = np.zeros(lanes * self.size, np.uint8)

    def _elements(self, lanes: Array, addresses: Array, size: int) -> Array:
        refuse_misaligned(addresses, size)
        refuse(addresses + np.uint64(size) > np.uint64(self.size), "an access out of a local array", addresses)
        return lanes * (self.size // size) + (addresses // np.uint64(size)).astype(np.int64)

    def load(self, lanes: Array, addresses: Array, size: int) -> Array:
        at = self._elements(lanes, addresses, size)
        unsigned = UNSIGNED[size]
        ones = unsigned(int.from_bytes(b"\1" * size, "little"))
        refuse(self.written.view(unsigned)[at] != ones, "a load of what was not written to a local array", addresses)
        return self.content.view(unsigned)[at]

    def store(self, lanes: Array, addresses: Array, values: Array) -> None:
        at = self._elements(lanes, addresses, values.dtype.itemsize)
        self.content.view(values.dtype)[at] = values
        self.written.view(values.dtype)[at] = values.dtype.type(int.from_bytes(b"\1" * values.dtype.itemsize, "little"))


def distinct_bytes(addresses: Array, warps: Array, size: int) -> int:
    """Of one access of some warps: bytes of the pieces of ``size`` bytes that they touch."""
    keys = warps.astype(np.uint64) << np.uint64(48) | (addresses - np.uint64(Memory.BASE)) // np.uint64(size)
    return int(np.unique(keys).size) * size


def turns_of_banks(addresses: Array, lanes: Array, size: int) -> tuple[int, int]:
    """(accesses, turns) of one access of some lanes to shared memory: a turn each, if no bank is wanted twice.

    Sixteen lanes are an access if each takes eight bytes, eight if each takes sixteen.
    """
    groups = (lanes // (128 // size)).astype(np.uint64)
    words = [groups << np.uint64(32) | (addresses // np.uint64(4) + np.uint64(k)) for k in range(size // 4)]
    distinct = np.unique(np.concatenate(words))
    wanted, counts = np.unique(distinct >> np.uint64(32) << np.uint64(8) | distinct % np.uint64(32), return_counts=True)
    most = np.zeros(int(wanted[-1] >> np.uint64(8)) + 1, np.int64)
    np.maximum.at(most, (wanted >> np.uint64(8)).astype(np.int64), counts)
    return int(np.unique(groups).size), int(most.sum())
