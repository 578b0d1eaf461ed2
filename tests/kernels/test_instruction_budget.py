"""The hot loops spend no more instructions on a weight than they did: counted, not timed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import squish_nf4
from tests.support import instruction_budget
from tests.support.compiling import compile_objects
from tests.support.disassembly import compilers, functions, require_x86_disassembler
from tests.support.helpers import require
from tests.support.instruction_budget import Count

SLACK = 1.1
SCALES_SLACK = 1.25  # what stands around a loop depends on more, as on the flags that Python was built with
TO_UPDATE = "if this is meant, type: python -m tests.support.instruction_budget"
LOOPS = instruction_budget.stored_loops()
EXECUTED = instruction_budget.stored_executed()


def require_gcc_12(binary: Path) -> None:
    """Other compilers make other loops, which the stored counts do not describe."""
    found = compilers(binary)
    is_gcc_12 = bool(found) and all(re.match(r"GCC: .* 12\.", name) for name in found)
    require("gcc-12", is_gcc_12, f"this was compiled by {found}")


@pytest.fixture(scope="module")
def loops() -> dict[str, Count]:
    require_x86_disassembler()
    library = Path(squish_nf4.library_path())
    require_gcc_12(library)
    return instruction_budget.measure(library)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_x86_disassembler()
    require("valgrind", shutil.which("valgrind") is not None, "valgrind is not installed")
    program = instruction_budget.compile_program(tmp_path_factory.mktemp("program"))
    require_gcc_12(program)
    return program


def over(name: str, what: str, found: float, budget: float) -> list[str]:
    if found <= budget:
        return []
    return [f"{name}: {found:g} {what}, the budget is {budget:.4g}; {TO_UPDATE}"]


def overspent(name: str, found: Count, stored: Count) -> list[str]:
    """A sentence for each number that has grown."""
    return [
        *over(name, "instructions a weight", found.per_weight, stored.per_weight * SLACK),
        *over(name, "instructions a weight and its scales", found.with_scales, stored.with_scales * SCALES_SLACK),
        *over(name, "instructions that move vectors to or from the stack", found.on_stack, stored.on_stack),
    ]


def test_every_hot_loop_is_found_and_has_a_budget(loops: dict[str, Count]) -> None:
    lost, new = sorted(LOOPS.keys() - loops), sorted(loops.keys() - LOOPS)
    assert (lost, new) == ([], []), f"loops without code: {lost}; loops without a budget: {new}; {TO_UPDATE}"


@pytest.mark.parametrize("loop", LOOPS)
def test_loop_keeps_its_budget(loops: dict[str, Count], loop: str) -> None:
    assert overspent(loop, loops[loop], LOOPS[loop]) == []


def test_no_loop_of_avx512_keeps_a_vector_on_the_stack(loops: dict[str, Count]) -> None:
    """AVX2 has sixteen registers, and the tables and sums of four rows are more.

    So are, on AVX-512, the sums of some activations beside the scales of every lane.
    """
    spilled = {loop: count.on_stack for loop, count in loops.items() if count.on_stack}
    assert [loop for loop in spilled if loop.startswith("avx512") and not loop.endswith(", any groups")] == []


@pytest.mark.builds
@pytest.mark.parametrize(("path", "what"), instruction_budget.EXECUTED)
def test_kernel_keeps_its_budget_when_it_runs(program: Path, tmp_path: Path, path: str, what: str) -> None:
    found, name = instruction_budget.executed(program, path, what, tmp_path), f"{path} {what}"
    assert over(name, "instructions a weight", found, EXECUTED[name] * SLACK) == []


SOURCE = """
#include <immintrin.h>
__attribute__((target("avx2,fma"))) float dot(const float* x, const float* y, long count, float* sums) {
  __m256 sum = _mm256_setzero_ps();
  for (long row = 0; row < 7; ++row) {
    for (long i = 0; i < count; i += 8) {
      sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), sum);
      EXTRA
    }
    _mm256_storeu_ps(sums + 8 * row, sum);
  }
  return sum[0];
}
"""


def measured_dot(folder: Path, extra: str) -> Count:
    source = folder / "dot.cpp"
    source.write_text(SOURCE.replace("EXTRA", extra))
    (compiled,) = compile_objects(folder, [source], ["-O1"])
    (loop,) = next(functions(compiled)).loops(r"vfmadd\d+ps ")
    assert len(loop.turn) > len(loop.code)
    return instruction_budget.count(loop, 8, around=True)


@pytest.mark.builds
@pytest.mark.parametrize(
    ("extra", "number"),
    [
        ("sum = _mm256_xor_ps(sum, _mm256_loadu_ps(y));", "per_weight"),
        ('asm volatile("vmovaps %0, -64(%%rsp)" : : "x"(sum));', "on_stack"),
    ],
)
def test_what_a_loop_does_more_is_noticed(tmp_path: Path, extra: str, number: str) -> None:
    require_x86_disassembler()
    before, after = measured_dot(tmp_path, ""), measured_dot(tmp_path, extra)
    assert getattr(after, number) > getattr(before, number)
    assert len(overspent("dot", after, before)) > 0
    assert overspent("dot", before, before) == []
