"""The executor of PTX itself (tests/support/ptx): what instructions give, and that every check finds its fault."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.support.ptx.machine import Costs, Kernel, launch
from tests.support.ptx.memory import KernelError, Memory
from tests.support.ptx.operations import fused
from tests.support.ptx.parser import parse

NEEDS_NO_GPU = True

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];

.func (.param .b32 func_retval0) twice(.param .b32 twice_param_0)
{
    .reg .b32 %r<3>;
    ld.param.u32 %r1, [twice_param_0];
    add.u32 %r2, %r1, %r1;
    st.param.b32 [func_retval0+0], %r2;
    ret;
}

.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.maxntid 64, 1, 1
{
    .local .align 8 .b8 depot[8];
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<20>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<20>;
    ld.param.u64 %rd1, [kernel_param_0];   // the input
    ld.param.u64 %rd2, [kernel_param_1];   // the output: four bytes for each thread
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    BODY
    ret;
}
"""


SHARED = "mov.u32 %r2, dynamic; shl.b32 %r3, %r1, 2; add.u32 %r3, %r3, %r2;"


def run(body: str, values: np.ndarray | None = None, threads: int = 32, costs: Costs | None = None) -> np.ndarray:
    """What the threads of one block leave in the output, of four bytes each."""
    module = parse(KERNEL.replace("BODY", body))
    memory = Memory()
    given = memory.upload(np.arange(threads, dtype=np.uint32) if values is None else values)
    result = memory.empty(4 * threads)
    arguments = {f"kernel_param_{k}": buffer.address.to_bytes(8, "little") for k, buffer in enumerate([given, result])}
    kernel = Kernel(module, module.functions["kernel"], {})
    launch(kernel, memory, (1, 1, 1), (threads, 1, 1), arguments, dynamic_shared=256, costs=costs)
    return result.bytes().view(np.uint32)


def computed(instructions: str, a: int, b: int = 0) -> int:
    """%r9, once %r2 is ``a`` and %r3 is ``b`` (%f2 and %f3 are the same bits, %rs2 and %rs3 their lower halves)."""
    body = f"""
        mov.u32 %r2, {a}; mov.u32 %r3, {b}; mov.b32 %f2, %r2; mov.b32 %f3, %r3; cvt.u16.u32 %rs2, %r2;
        cvt.u64.u32 %rd6, %r2; setp.lt.u32 %p1, %r2, %r3;
        {instructions}
        st.global.u32 [%rd5], %r9;
    """
    found = run(body)
    assert len(set(found.tolist())) == 1
    return int(found[0])


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("instructions", "a", "b", "expected"),
    [
        ("sub.s32 %r9, %r2, %r3;", 3, 5, 0xFFFFFFFE),
        ("mul.lo.u32 %r9, %r2, %r3;", 0x10001, 0x10001, 0x20001),
        ("mul.wide.s32 %rd7, %r2, %r3; shr.u64 %rd7, %rd7, 32; cvt.u32.u64 %r9, %rd7;", 0xFFFFFFFF, 2, 0xFFFFFFFF),
        ("mul.wide.u32 %rd7, %r2, %r3; shr.u64 %rd7, %rd7, 32; cvt.u32.u64 %r9, %rd7;", 0xFFFFFFFF, 2, 1),
        ("mad.lo.s32 %r9, %r2, %r3, 7;", 6, 5, 37),
        ("div.s32 %r9, %r2, %r3;", 0xFFFFFFF9, 2, 0xFFFFFFFD),  # -7 / 2 is -3
        ("div.u32 %r9, %r2, %r3;", 0xFFFFFFF9, 2, 0x7FFFFFFC),
        ("min.s32 %r9, %r2, %r3;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("max.u32 %r9, %r2, %r3;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("shl.b32 %r9, %r2, %r3;", 1, 33, 0),
        ("shr.s32 %r9, %r2, %r3;", 0x80000000, 40, 0xFFFFFFFF),
        ("shr.u32 %r9, %r2, %r3;", 0x80000000, 31, 1),
        ("not.b32 %r9, %r2;", 0x0F0F0F0F, 0, 0xF0F0F0F0),
        ("prmt.b32 %r9, %r2, %r3, 0x5410;", 0x33221100, 0x77665544, 0x55441100),
        ("prmt.b32 %r9, %r2, %r3, 0x0e80;", 0x000000F0, 0x70800000, 0xF0FFFFF0),  # two bytes give their sign
        ("bfi.b32 %r9, %r2, %r3, 8, 4;", 0xABC, 0xFFFF0000, 0xFFFF0C00),
        ("selp.u32 %r9, 5, 6, %p1;", 1, 2, 5),
        ("@%p1 mov.u32 %r9, 8; @!%p1 mov.u32 %r9, 9;", 1, 2, 8),
        ("cvt.s32.s16 %r9, %rs2;", 0x12348000, 0, 0xFFFF8000),
        ("cvt.u32.u16 %r9, %rs2;", 0x12348000, 0, 0x8000),
        ("mov.b32 {%rs3, %rs4}, %r2; mov.b32 %r9, {%rs4, %rs3};", 0x12345678, 0, 0x56781234),
        ("{ .reg .b16 half; mov.b32 {half, %rs4}, %r2; cvt.u32.u16 %r9, half;}", 0x12345678, 0, 0x5678),
        ("add.rn.f32 %f4, %f2, %f3; mov.b32 %r9, %f4;", float_bits(1), float_bits(2**-24), float_bits(1)),
        ("mul.rn.f32 %f4, %f2, %f3; mov.b32 %r9, %f4;", float_bits(2**-100), float_bits(2**-40), 2**9),  # subnormal
        ("div.rn.f32 %f4, %f2, %f3; mov.b32 %r9, %f4;", float_bits(1), float_bits(3), 0x3EAAAAAB),
        ("rcp.rn.f32 %f4, %f3; mov.b32 %r9, %f4;", 0, float_bits(3), 0x3EAAAAAB),
        (
            "sub.rn.f32 %f4, %f2, %f3; mov.b32 %r9, %f4;",
            0x7F800000,
            0x7F800000,
            0x7FFFFFFF,
        ),  # the one NaN of arithmetic
        ("mov.f32 %f4, %f2; mov.b32 %r9, %f4;", 0x7FC12345, 0, 0x7FC12345),
        ("neg.f32 %f4, %f2; mov.b32 %r9, %f4;", float_bits(1), 0, float_bits(-1)),
        ("setp.ne.f32 %p2, %f2, %f3; selp.u32 %r9, 1, 0, %p2;", 0x7FC00000, 0, 0),
        ("setp.num.f32 %p2, %f2, %f3; selp.u32 %r9, 1, 0, %p2;", 0x7FC00000, 0, 0),
        ("setp.lt.s32 %p2, %r2, %r3; selp.u32 %r9, 1, 0, %p2;", 0xFFFFFFFF, 0, 1),
        ("cvt.rn.bf16x2.f32 %r9, %f2, %f3;", float_bits(1), 0x40408000, 0x3F804040),  # a tie goes to the even one
        ("cvt.rn.f16x2.f32 %r9, %f2, %f3;", float_bits(65520), 0xFFC00000, 0x7C007FFF),
        ("cvt.f32.f16 %f4, %rs2; mov.b32 %r9, %f4;", 0x0001, 0, float_bits(2**-24)),
        ("cvt.rn.f32.s32 %f4, %r2; mov.b32 %r9, %f4;", 0xFFFFFFFE, 0, float_bits(-2)),
        (
            "{ .param .b32 param0; st.param.b32 [param0+0], %r2; .param .b32 retval0;"
            " call.uni (retval0), twice, (param0); ld.param.b32 %r9, [retval0+0]; }",
            21,
            0,
            42,
        ),
        (
            "mov.u64 %rd6, depot; st.local.u32 [%rd6], %r2; st.local.u32 [%rd6+4], %r3;"
            " ld.local.v2.u32 {%r4, %r5}, [%rd6]; add.u32 %r9, %r4, %r5;",
            40,
            2,
            42,
        ),
    ],
)
def test_instructions(instructions: str, a: int, b: int, expected: int) -> None:
    assert hex(computed(instructions, a, b)) == hex(expected)


def test_a_fused_product_and_sum_is_rounded_once() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(4000).astype(np.float32) * np.float32(2.0) ** rng.integers(-60, 60, 4000) for _ in "ab")
    c = (-(a * b)) * (1 + rng.integers(-4, 4, 4000) * np.float32(2**-23)) + rng.choice([0, 1e-45, 1e-30], 4000)
    c = c.astype(np.float32)
    c[::3] = rng.standard_normal(c[::3].size)
    a[:200], b[:200] = a[:200] * np.float32(2.0**-80), b[:200] * np.float32(2.0**-20)  # results without full precision
    a, b = a.astype(np.float32), b.astype(np.float32)
    for found, *values in zip(fused(a, b, c).tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
        below, above = (float(np.nextafter(np.float32(found), np.float32(end))) for end in (-np.inf, np.inf))
        distance = abs(Fraction(found) - exact)
        assert distance <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact)), values


def test_a_fused_sum_that_a_second_rounding_would_turn_over() -> None:
    a = np.array([1 + 2.0**-12], np.float32)  # a^2 = 1 + 2^-11 + 2^-24: a tie of float32, but for c
    c = np.array([2.0**-80], np.float32)
    assert fused(a, a, -c)[0] == np.float32(1 + 2.0**-11)
    assert fused(a, a, c)[0] == np.float32(1 + 2.0**-11 + 2.0**-23)


def test_ways_of_a_branch_come_together() -> None:
    found = run(
        """
        mov.u32 %r9, 0; and.b32 %r2, %r1, 7;
        loop: setp.eq.u32 %p1, %r2, 0; @%p1 bra done;
        add.u32 %r9, %r9, %r2; sub.u32 %r2, %r2, 1; bra loop;
        done: shfl.sync.bfly.b32 %r3|%p2, %r9, 1, 31, -1;
        st.global.u32 [%rd5], %r3;
        """
    )
    sums = [sum(range(lane % 8 + 1)) for lane in range(32)]
    assert found.tolist() == [sums[lane ^ 1] for lane in range(32)]


@pytest.mark.parametrize(
    ("mode", "lane", "clamp", "expected"),
    [
        ("idx", "%r2", 31, lambda lane: (lane * 5) % 32),
        ("idx", "%r2", 0x101F, lambda lane: lane // 16 * 16 + (lane * 5) % 16),  # in halves of a warp
        ("bfly", "4", 31, lambda lane: lane ^ 4),
    ],
)
def test_shuffles(mode: str, lane: str, clamp: int, expected: object) -> None:
    body = f"mul.lo.u32 %r2, %r1, 5; shfl.sync.{mode}.b32 %r3|%p1, %r1, {lane}, {clamp}, -1; st.global.u32 [%rd5], %r3;"
    assert run(body).tolist() == [expected(lane) for lane in range(32)]  # type: ignore[operator]


def test_a_product_of_matrices() -> None:
    """Small integers, so that any order of adding gives the same."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(-8, 8, (16, 16)).astype(np.float32), rng.integers(-8, 8, (16, 8)).astype(np.float32)
    bits = lambda values: values.astype(np.float16).view(np.uint16).astype(np.uint32)  # noqa: E731
    words = np.zeros((6, 32), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        places = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        for k, (row, column) in enumerate(places):
            words[k, lane] = bits(a[row, column]) | bits(a[row, column + 1]) << 16
        for k in range(2):
            words[4 + k, lane] = bits(b[2 * t + 8 * k, g]) | bits(b[2 * t + 8 * k + 1, g]) << 16
    loads = "".join(f"ld.global.nc.u32 %r{2 + k}, [%rd4+{128 * k}];" for k in range(6))
    for k in range(4):
        product = run(
            f"""{loads} mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
            mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f5,%f6,%f7,%f8}}, {{%r2,%r3,%r4,%r5}}, {{%r6,%r7}},
                {{%f1,%f2,%f3,%f4}};
            st.global.f32 [%rd5], %f{5 + k};""",
            words,
        ).view(np.float32)
        expected = (a @ b + 1)[8 * (k // 2) : 8 * (k // 2) + 8, k % 2 :: 2]
        assert np.array_equal(product.reshape(8, 4), expected)


def test_shared_memory_is_seen_after_a_barrier_and_its_banks_are_counted() -> None:
    costs = Costs()
    found = run(
        """
        mov.u32 %r2, dynamic; shl.b32 %r3, %r1, 2; add.u32 %r3, %r3, %r2; st.shared.u32 [%r3], %r1; bar.sync 0;
        xor.b32 %r4, %r1, 63; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r2; ld.shared.u32 %r5, [%r4];
        and.b32 %r6, %r1, 1; shl.b32 %r6, %r6, 7; add.u32 %r6, %r6, %r2; ld.shared.u32 %r7, [%r6];
        st.global.u32 [%rd5], %r5;
        """,
        threads=64,
        costs=costs,
    )
    assert found.tolist() == [63 - thread for thread in range(64)]
    assert costs.turns("st") == 1
    assert costs.turns("ld") == 1.5  # half of them want two words of one bank
    assert costs.sector_efficiency() == 1


@pytest.mark.parametrize(("apart", "turns"), [(2, 1), (4, 2), (8, 2), (16, 2), (0, 1)])
def test_turns_of_the_banks_for_eight_bytes_a_lane(apart: int, turns: float) -> None:
    """Words ``apart``: sixteen lanes are an access."""
    costs = Costs()
    body = f"""{SHARED} st.shared.u32 [%r3], %r1; st.shared.u32 [%r3+128], %r1; bar.sync 0;
        and.b32 %r4, %r1, 15; mul.lo.u32 %r4, %r4, {4 * apart}; and.b32 %r4, %r4, 255; add.u32 %r4, %r4, %r2;
        ld.shared.v2.u32 {{%r5, %r6}}, [%r4]; st.global.u32 [%rd5], %r5;"""
    run(body, costs=costs)
    assert costs.turns("ld") == turns


def test_sectors_are_counted() -> None:
    costs = Costs()
    body = """
        mul.wide.u32 %rd6, %r1, 16; add.s64 %rd6, %rd1, %rd6; ld.global.u32 %r2, [%rd6]; st.global.u32 [%rd5], %r2;
    """
    assert run(body, np.arange(128, dtype=np.uint32), costs=costs).tolist() == [4 * thread for thread in range(32)]
    assert costs.sector_efficiency("ld") == 0.25
    assert costs.sector_efficiency("st") == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.u32 %r9, [%rd4+4]; st.global.u32 [%rd5], %r9;", "thread 31 of block 0: an access out of bounds"),
        ("ld.global.u32 %r9, [%rd4+-4]; st.global.u32 [%rd5], %r9;", "thread 0 of block 0: an access out of bounds"),
        ("mov.u64 %rd6, 64; ld.global.u32 %r9, [%rd6]; st.global.u32 [%rd5], %r9;", "out of bounds, at 0x40"),
        ("ld.global.u32 %r9, [%rd4+2]; st.global.u32 [%rd5], %r9;", "4 bytes that is not aligned"),
        (
            "ld.global.v2.u32 {%r8, %r9}, [%rd4]; st.global.u32 [%rd5], %r9;",
            "thread 1 of block 0: .* 8 bytes .* not aligned",
        ),
        ("ld.global.u32 %r9, [%rd5]; st.global.u32 [%rd5], %r9;", "a load of what nobody has written"),
        ("st.global.u32 [%rd5+4], %r1;", "thread 31 of block 0: an access out of bounds"),
        ("st.global.u32 [%rd4], %r1;", "a store to an input"),
        ("st.global.u32 [%rd2], %r1;", "two values for one place"),
        ("st.global.u32 [%rd5], %r1; add.u32 %r2, %r1, 1; st.global.u32 [%rd5], %r2;", "two values for one place"),
        ("setp.eq.u32 %p1, %r1, 5; @%p1 bra end; st.global.u32 [%rd5], %r1; end:", "4 of 128 bytes .* not written"),
        (f"{SHARED} st.shared.u32 [%r3], %r1; ld.shared.u32 %r9, [%r2];", "another thread wrote, and no barrier"),
        (f"{SHARED} ld.shared.u32 %r9, [%r3];", "shared memory that nobody has written"),
        (f"{SHARED} st.shared.u32 [%r2], %r1;", "two threads store to one place"),
        (
            f"{SHARED} st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r9, [%r2]; st.shared.u32 [%r3], %r1;",
            "a store where another thread wrote or read",
        ),
        (f"{SHARED} st.shared.u32 [%r3+256], %r1;", "out of bounds in shared memory"),
        (
            f"{SHARED} cp.async.ca.shared.global [%r3], [%rd4], 4; bar.sync 0; ld.shared.u32 %r9, [%r3];",
            "an asynchronous copy may not have brought",
        ),
        (
            f"{SHARED} cp.async.ca.shared.global [%r3], [%rd4], 4; cp.async.wait_all; ld.shared.u32 %r9, [%r2];",
            "another thread wrote, and no barrier",
        ),
        ("mov.u64 %rd6, depot; ld.local.u32 %r9, [%rd6];", "not written to a local array"),
        ("mov.u64 %rd6, depot; st.local.u32 [%rd6+8], %r1;", "out of a local array"),
        ("setp.eq.u32 %p1, %r1, 5; @%p1 bra end; bar.sync 0; end:", "waits for threads that never come: bar.sync 0"),
        (
            "setp.eq.u32 %p1, %r1, 5; @%p1 bra end; shfl.sync.idx.b32 %r2|%p2, %r1, 0, 31, -1; end:",
            "waits for threads that never come: shfl",
        ),
        ("div.u32 %r9, 6, %r1;", "thread 0 of block 0: a division of integers by zero"),
        (
            "setp.eq.u32 %p1, %r1, 0; @%p1 bra end; sub.u32 %r2, %r1, 5; div.u32 %r9, 6, %r2; end:",
            "thread 5 .* by zero",
        ),
        ("st.global.u32 [%rd5], %r1; ld.global.u32 %r9, [%rd5];", "a load of what the same launch writes"),
        ("cvt.u16.u32 %rs2, %r1; st.global.u8 [%rd5], %rs2; st.global.u32 [%rd5], 7;", "two values for one place"),
        (
            f"{SHARED} cp.async.ca.shared.global [%r3], [%rd4], 4; st.shared.u32 [%r3], %r1;",
            "a store where an asynchronous copy is under way",
        ),
        (
            f"{SHARED} cp.async.ca.shared.global [%r3], [%rd4], 4; bar.sync 0; cp.async.wait_all;"
            " ld.shared.u32 %r9, [%r2];",
            "another thread wrote, and no barrier",
        ),
        ("again: bra again;", "has not ended"),
    ],
)
def test_faults(body: str, said: str) -> None:
    with pytest.raises(KernelError, match=said):
        run(body)


def test_a_block_larger_than_the_kernel_is_compiled_for_is_refused() -> None:
    with pytest.raises(KernelError, match="96 threads a block, where the kernel is compiled for 64"):
        run("", threads=96)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.ftz.f32 %f1, %f1, %f1;",
        "div.approx.f32 %f1, %f1, %f1;",
        "fma.rn.ftz.f32 %f1, %f1, %f1, %f1;",
        "atom.global.add.f32 %f1, [%rd5], %f1;",
        "red.global.add.f32 [%rd5], %f1;",
        "vote.sync.all.pred %p1, %p1, -1;",
        "ld.volatile.global.u32 %r9, [%rd4];",
    ],
)
def test_an_instruction_that_no_kernel_of_ours_uses_is_named(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=instruction.split()[0].replace(".", r"\.")):
        run(instruction)
