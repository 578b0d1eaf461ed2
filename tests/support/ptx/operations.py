"""What the instructions of PTX mean, for all lanes at once: those that our kernels use, and no others.

An instruction is known by its whole name, so one that flushes subnormals, divides approximately, rounds another way or
adds by atomics is an error when a kernel with it is linked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.ptx.memory import UNSIGNED, Array, KernelError
from tests.support.ptx.parser import Address, Instruction, Literal, Operand, Register, Several, Symbol, float_of

if TYPE_CHECKING:
    from tests.support.ptx.machine import Kernel, Machine

Step = Callable[["Machine"], None]
Read = Callable[["Machine"], Array]
Meaning = Callable[["Kernel", Instruction, re.Match[str]], Step]

WARP = 32
DTYPES: dict[str, Any] = {
    **{f"{kind}{8 * size}": UNSIGNED[size] for kind in "bu" for size in UNSIGNED},
    **{f"s{8 * size}": np.dtype(f"i{size}").type for size in UNSIGNED},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
NAN_BITS = {np.float16: 0x7FFF, np.float32: 0x7FFF_FFFF}  # what the processor makes of every NaN that it computes

MEANINGS: list[tuple[re.Pattern[str], Meaning]] = []


def meaning(pattern: str) -> Callable[[Meaning], Meaning]:
    def register(function: Meaning) -> Meaning:
        MEANINGS.append((re.compile(pattern), function))
        return function

    return register


def step_of(kernel: Kernel, instruction: Instruction) -> Step:
    """What runs the instruction; NotImplementedError if it is none of ours."""
    for pattern, make in MEANINGS:
        if match := pattern.fullmatch(instruction.name):
            return make(kernel, instruction, match)
    raise NotImplementedError(f"{kernel.name}: no kernel of ours has used this yet: {instruction.text}")


# --- Operands -------------------------------------------------------------------------------------------------------


def typed(values: Array, dtype: Any) -> Array:
    """The bits of a register as a type, of which they may be more than it takes."""
    size = np.dtype(dtype).itemsize
    if values.dtype.itemsize != size:
        values = values.astype(UNSIGNED[size])
    return values.view(dtype)


def reader(kernel: Kernel, operand: Operand, dtype: Any) -> Read:
    if isinstance(operand, Literal):
        if issubclass(dtype, np.floating):
            value = np.array([float_of(operand)], dtype)
        elif dtype is np.bool_:
            value = np.array([bool(operand.value)])
        else:  # the bits of a float may be moved as an integer
            size = np.dtype(dtype).itemsize
            value = np.array([operand.value % (1 << (8 * size))], UNSIGNED[size]).view(dtype)
        return lambda machine: value
    if isinstance(operand, Symbol):
        address = np.array([kernel.address_of(operand.name)], np.uint64)
        return lambda machine: typed(address, dtype)
    assert isinstance(operand, Register), operand
    name = operand.name
    if name in kernel.registers:
        return lambda machine: typed(machine.registers[name], dtype)
    return lambda machine: typed(machine.special(name), dtype)


def writer(kernel: Kernel, operand: Operand) -> Callable[[Machine, Array], None]:
    if operand == Symbol("_"):
        return lambda machine, value: None
    assert isinstance(operand, Register), operand
    name, size = operand.name, kernel.registers[operand.name]

    def write(machine: Machine, value: Array) -> None:
        if value.dtype != np.bool_:
            if value.dtype.itemsize != size:  # an integer: extended as its type says
                value = value.astype(f"{value.dtype.kind}{size}")
            value = value.view(UNSIGNED[size])
        machine.put(name, value)

    return write


def one_nan(values: Array) -> Array:
    """The results of arithmetic: the processor has one NaN."""
    bits = NAN_BITS.get(values.dtype.type)
    if bits is not None and (bad := np.isnan(values)).any():
        values = values.copy()
        values.view(UNSIGNED[values.dtype.itemsize])[bad] = bits
    return values


def parts_of(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Several) else (operand,)


# --- One result from operands of the same lane ----------------------------------------------------------------------


def elementwise(pattern: str, result: str, operands: str, compute: Callable[..., Array]) -> None:
    """result, operands: types, or names of groups of the pattern that match one."""

    @meaning(pattern)
    def make(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
        def dtype(word: str) -> Any:
            return DTYPES[match.groupdict().get(word, word)]

        write = writer(kernel, instruction.operands[0])
        sources = instruction.operands[1:]
        reads = [reader(kernel, *pair) for pair in zip(sources, map(dtype, operands.split()), strict=True)]
        into = dtype(result)

        def step(machine: Machine) -> None:
            value = compute(*(read(machine) for read in reads))
            write(machine, one_nan(value.astype(into, copy=False)))

        return step


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32, rounded once: the product is exact in float64, and its sum with c is rounded to odd there,
    which a second rounding does not turn over (Boldo and Melquiond, When double rounding is odd, 2005)."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    rest = total - product  # Knuth's two-sum: what rounding took from the total
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view(np.int64)
    is_even = (bits & 1 == 0) & (error != 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    bits = np.where(is_even, np.where(away, bits + 1, bits - 1), bits)
    return np.asarray(bits.view(np.float64).astype(np.float32))


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero."""
    floor = a // b
    return np.asarray(floor + ((floor < 0) & (floor * b != a)))


@meaning(r"div\.(?P<t>[us](16|32|64))")
def divide(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    to, *sources = instruction.operands
    write = writer(kernel, to)
    dividend_of, divisor_of = (reader(kernel, operand, DTYPES[match["t"]]) for operand in sources)

    def step(machine: Machine) -> None:
        divisor = divisor_of(machine)
        zero = machine.of_active(divisor) == 0
        if zero.any():
            raise KernelError("a division of integers by zero", int(np.argmax(zero)))
        write(machine, quotient(dividend_of(machine), divisor))

    return step


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a, each chosen by four bits; the highest of them copies the byte's sign instead."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.zeros(1, np.uint32)
    for k in range(4):
        choice = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = ((both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)).astype(np.uint32)
        sign = (byte >> np.uint32(7)) * np.uint32(255)
        result = result | np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * k)
    return result


def inserted(a: Array, b: Array, at: Array, count: Array) -> Array:
    """The lowest bits of a in the place of some of b's."""
    field = ((np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)) << at.astype(np.uint64)
    return (b & ~field) | ((a.astype(np.uint64) << at.astype(np.uint64)) & field)


def bfloat16_bits(values: Array) -> Array:
    """float32 to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def float16_bits(values: Array) -> Array:
    return one_nan(values.astype(np.float16)).view(np.uint16)


def side_by_side(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << np.uint32(16) | low


INTEGER, BITS = r"(?P<t>[us](16|32|64))", r"(?P<t>b(16|32|64)|pred)"
for name, compute in {
    "add": np.add,
    "sub": np.subtract,
    r"mul\.lo": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}.items():
    elementwise(rf"{name}\.{INTEGER}", "t", "t t", compute)
elementwise(rf"mad\.lo\.{INTEGER}", "t", "t t t", lambda a, b, c: a * b + c)
elementwise(r"mul\.wide\.s32", "s64", "s32 s32", lambda a, b: a.astype(np.int64) * b.astype(np.int64))
elementwise(r"mul\.wide\.u16", "u32", "u16 u16", lambda a, b: a.astype(np.uint32) * b.astype(np.uint32))
elementwise(r"mul\.wide\.u32", "u64", "u32 u32", lambda a, b: a.astype(np.uint64) * b.astype(np.uint64))
elementwise(rf"and\.{BITS}", "t", "t t", np.bitwise_and)
elementwise(rf"or\.{BITS}", "t", "t t", np.bitwise_or)
elementwise(rf"xor\.{BITS}", "t", "t t", np.bitwise_xor)
elementwise(rf"not\.{BITS}", "t", "t", np.invert)
elementwise(r"shl\.(?P<t>b(16|32|64))", "t", "t u32", np.left_shift)  # by more than the width: zero, as in numpy
elementwise(r"shr\.(?P<t>[bsu](16|32|64))", "t", "t u32", np.right_shift)
elementwise(r"prmt\.b32", "b32", "b32 b32 b32", permuted)
elementwise(r"bfi\.(?P<t>b32|b64)", "t", "t t u32 u32", inserted)
for size in (16, 32, 64):  # the bits as they are
    elementwise(
        rf"selp\.[bsuf]{size}", f"b{size}", f"b{size} b{size} pred", lambda a, b, chosen: np.where(chosen, a, b)
    )

elementwise(r"add\.rn\.(?P<t>f32|f64)", "t", "t t", np.add)
elementwise(r"sub\.rn\.f32", "f32", "f32 f32", np.subtract)
elementwise(r"mul\.rn\.(?P<t>f32|f64)", "t", "t t", np.multiply)
elementwise(r"div\.rn\.f32", "f32", "f32 f32", np.divide)
elementwise(r"fma\.rn\.f32", "f32", "f32 f32 f32", fused)
elementwise(r"rcp\.rn\.f32", "f32", "f32", lambda a: np.float32(1) / a)
elementwise(r"neg\.f32", "b32", "b32", lambda a: a ^ np.uint32(1 << 31))
elementwise(r"abs\.f64", "f64", "f64", np.abs)

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for name, compare in COMPARISONS.items():  # of floats: false if one is NaN
    elementwise(rf"setp\.{name}\.(?P<t>[bsu](16|32|64)|f32)", "pred", "t t", compare)
elementwise(r"setp\.num\.(?P<t>f32)", "pred", "t t", lambda a, b: (a == a) & (b == b))

elementwise(r"cvt\.(?P<to>[us](8|16|32|64))\.(?P<t>[us](8|16|32|64))", "to", "t", lambda a: a)
elementwise(r"cvt\.(?P<to>f32|f64)\.(?P<t>f16|f32)", "to", "t", lambda a: a)  # to a wider one
elementwise(r"cvt\.rn\.f32\.(?P<t>f64|[us]32|[us]64)", "f32", "t", lambda a: a)
elementwise(r"cvt\.rn\.f16x2\.f32", "b32", "f32 f32", lambda a, b: side_by_side(float16_bits(a), float16_bits(b)))
elementwise(r"cvt\.rn\.bf16x2\.f32", "b32", "f32 f32", lambda a, b: side_by_side(bfloat16_bits(a), bfloat16_bits(b)))
elementwise(r"cvta(\.to)?\.(global|local|shared|const)\.u64", "u64", "u64", lambda a: a)  # loads say the space


@meaning(r"mov\.(?P<t>[bsuf](16|32|64)|pred)")
def move(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    """Also halves to a whole, and a whole to halves."""
    to, source = instruction.operands
    dtype = DTYPES[match["t"]]
    bits = 8 * np.dtype(dtype).itemsize
    if isinstance(to, Several):
        part = bits // len(to.parts)
        read, writes = reader(kernel, source, dtype), [writer(kernel, operand) for operand in to.parts]

        def take_apart(machine: Machine) -> None:
            whole = read(machine)
            for k, write in enumerate(writes):
                write(machine, (whole >> dtype(k * part)).astype(DTYPES[f"u{part}"]))

        return take_apart
    write = writer(kernel, to)
    if isinstance(source, Several):
        part = bits // len(source.parts)
        reads = [reader(kernel, operand, DTYPES[f"u{part}"]) for operand in source.parts]

        def put_together(machine: Machine) -> None:
            values = [read(machine).astype(dtype) << dtype(k * part) for k, read in enumerate(reads)]
            write(machine, np.bitwise_or.reduce(np.broadcast_arrays(*values)))

        return put_together
    read = reader(kernel, source, dtype)
    return lambda machine: write(machine, read(machine))


# --- Memory ---------------------------------------------------------------------------------------------------------


def address_reader(kernel: Kernel, operand: Operand) -> Read:
    assert isinstance(operand, Address), operand
    read, offset = reader(kernel, operand.base, np.uint64), np.uint64(operand.offset % (1 << 64))
    return lambda machine: machine.of_active(read(machine) + offset)


@meaning(r"ld\.(?P<space>global|const|shared|local|param)(\.nc|\.cs)?(\.v[24])?\.(?P<t>[bsuf](8|16|32|64))")
def load(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    to, place = instruction.operands
    assert isinstance(place, Address), instruction.text
    writes = [writer(kernel, operand) for operand in parts_of(to)]
    dtype = DTYPES[match["t"]]
    size = np.dtype(dtype).itemsize
    if match["space"] == "param":
        if isinstance(place.base, Register):  # of a call that stands inlined here
            read = reader(kernel, place.base, dtype)
            return lambda machine: writes[0](machine, read(machine))
        assert isinstance(place.base, Symbol), instruction.text
        parameter, offset = place.base.name, place.offset

        def load_parameter(machine: Machine) -> None:
            data = machine.parameters[parameter]
            for k, write in enumerate(writes):
                write(machine, np.frombuffer(data, dtype, 1, offset + k * size))

        return load_parameter
    addresses_of = address_reader(kernel, place)

    def step(machine: Machine) -> None:
        addresses = addresses_of(machine)
        values = machine.load(instruction, match["space"], addresses, size, len(writes))
        for write, value in zip(writes, values, strict=True):
            write(machine, machine.spread(value).view(dtype))

    return step


@meaning(r"st\.(?P<space>global|shared|local|param)(\.cs)?(\.v[24])?\.(?P<t>[bsuf](8|16|32|64))")
def store(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    place, source = instruction.operands
    assert isinstance(place, Address), instruction.text
    dtype = DTYPES[match["t"]]
    reads = [reader(kernel, operand, dtype) for operand in parts_of(source)]
    if match["space"] == "param":
        write = writer(kernel, place.base)
        return lambda machine: write(machine, reads[0](machine))
    addresses_of = address_reader(kernel, place)
    unsigned = UNSIGNED[np.dtype(dtype).itemsize]

    def step(machine: Machine) -> None:
        values = [machine.of_active(read(machine).view(unsigned)) for read in reads]
        machine.store(instruction, match["space"], addresses_of(machine), values)

    return step


@meaning(r"cp\.async\.c[ag]\.shared\.global")
def copy(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    to, source, count = instruction.operands
    assert isinstance(count, Literal), instruction.text
    to_of, from_of, words = address_reader(kernel, to), address_reader(kernel, source), count.value // 4

    def step(machine: Machine) -> None:
        values = machine.load(instruction, "global", from_of(machine), 4, words)
        machine.store(instruction, "shared", to_of(machine), values, copied=True)

    return step


@meaning(r"cp\.async\.wait_all")
def wait(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    return lambda machine: machine.shared.wait(machine.active())


# --- Lanes of a warp together ---------------------------------------------------------------------------------------


@meaning(r"shfl\.sync\.(?P<mode>idx|bfly)\.b32")
def shuffle(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    to, *sources = instruction.operands
    targets = parts_of(to)
    write, write_valid = writer(kernel, targets[0]), writer(kernel, targets[1] if len(targets) > 1 else Symbol("_"))
    value_of, lane_of, clamp_of, members_of = (reader(kernel, operand, np.uint32) for operand in sources)

    def step(machine: Machine) -> None:
        if (members_of(machine) != np.uint32(0xFFFFFFFF)).any():
            raise NotImplementedError(f"a shuffle among some lanes of a warp: {instruction.text}")
        value = machine.full(value_of(machine)).reshape(-1, WARP)
        wanted = machine.full(lane_of(machine)).reshape(-1, WARP).astype(np.int64) & 31
        clamp = machine.full(clamp_of(machine)).reshape(-1, WARP).astype(np.int64)
        lane, segment, most = np.arange(WARP), clamp >> 8 & 31, clamp & 31
        last = lane & segment | most & ~segment
        source = lane & segment | wanted & ~segment if match["mode"] == "idx" else lane ^ wanted
        valid = source <= last
        result = np.take_along_axis(value, np.where(valid, source, lane), axis=1)
        write(machine, result.reshape(-1))
        write_valid(machine, valid.reshape(-1))

    return step


@meaning(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<t>bf16|f16)\.(?P=t)\.f32")
def multiply(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    """d = a b + c of 16 x 16 and 16 x 8 values. Lane (g, t) = (lane / 4, lane % 4) holds rows g and g+8, columns 2t and
    2t+1 (of a and b also those 8 on). Summed in float64 and rounded once, which no GPU does."""
    d, a, b, c = map(parts_of, instruction.operands)
    writes = [writer(kernel, operand) for operand in d]
    a_of, b_of = ([reader(kernel, operand, np.uint32) for operand in operands] for operands in (a, b))
    c_of = [reader(kernel, operand, np.float32) for operand in c]

    def halves(machine: Machine, read: Read) -> tuple[Array, Array]:
        bits = machine.full(read(machine)).reshape(-1, 8, 4)
        if match["t"] == "bf16":
            low, high = (bits << np.uint32(16)).view(np.float32), (bits & np.uint32(0xFFFF0000)).view(np.float32)
        else:
            low, high = (part.astype(np.uint16).view(np.float16) for part in (bits, bits >> np.uint32(16)))
        return low.astype(np.float64), high.astype(np.float64)

    def step(machine: Machine) -> None:
        warps = machine.lanes // WARP
        left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for k, read in enumerate(a_of):
            rows, first = slice(8 * (k % 2), 8 * (k % 2) + 8), 8 * (k // 2)
            left[:, rows, first : first + 8 : 2], left[:, rows, first + 1 : first + 8 : 2] = halves(machine, read)
        for k, read in enumerate(b_of):
            low, high = halves(machine, read)
            right[:, 8 * k : 8 * k + 8 : 2], right[:, 8 * k + 1 : 8 * k + 8 : 2] = low.mT, high.mT
        for k, read in enumerate(c_of):
            sums[:, 8 * (k // 2) : 8 * (k // 2) + 8, k % 2 :: 2] = machine.full(read(machine)).reshape(-1, 8, 4)
        sums = one_nan((left @ right + sums).astype(np.float32))
        for k, write in enumerate(writes):
            part = sums[:, 8 * (k // 2) : 8 * (k // 2) + 8, k % 2 :: 2]
            write(machine, np.ascontiguousarray(part).reshape(-1))

    return step


@meaning(r"bar\.sync")
def barrier(kernel: Kernel, instruction: Instruction, match: re.Match[str]) -> Step:
    if instruction.operands != (Literal(0),):
        raise NotImplementedError(f"a barrier of some threads of a block: {instruction.text}")
    return lambda machine: machine.pass_barrier()
