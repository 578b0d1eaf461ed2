"""The fast CUDA kernels spend no more machine instructions on a weight than they did, on GPUs from old to new."""

from __future__ import annotations

import pytest

from tests.support import ROOT, cuda_budget
from tests.support.cuda_budget import Count, Function, Line

NEEDS_NO_GPU = True
pytestmark = pytest.mark.builds

SLACK = 1.05
TO_UPDATE = "if this is meant, type: python -m tests.support.cuda_budget"
STORED = cuda_budget.stored()


@pytest.fixture(scope="module", params=cuda_budget.ARCHITECTURES, ids=lambda number: f"sm_{number}")
def built(request: pytest.FixtureRequest) -> tuple[str, dict[str, Function]]:
    return f"sm_{request.param}", cuda_budget.disassembled(request.param)


def test_every_kernel_keeps_its_budget(built: tuple[str, dict[str, Function]]) -> None:
    architecture, functions = built
    found, stored = cuda_budget.measure(functions), STORED[architecture]
    assert found.keys() == stored.keys(), TO_UPDATE
    grown = {
        name: (count, stored[name])
        for name, count in found.items()
        if count.per_weight > stored[name].per_weight * SLACK
        or count.registers > stored[name].registers * SLACK
        or count.on_stack > stored[name].on_stack
    }
    assert grown == {}, TO_UPDATE


ROWS = {  # of the table in docs/cuda.md
    "quantize float32": ["quantize float"],
    "quantize bfloat16 / float16": ["quantize BFloat16", "quantize Float16"],
    "dequantize float32": ["dequantize float"],
    "dequantize bfloat16 and float16": ["dequantize BFloat16"],
    "linear, up to 4 activations": ["linear, 1 tiles"],
    "linear, up to 8": ["linear, 2 tiles"],
    "linear, up to 16": ["linear, 4 tiles, arranged"],
    "linear, up to 32": ["linear, 8 tiles, arranged"],
    "linear without tensor cores, 1 / 8": ["linear without tensor cores, 1", "linear without tensor cores, 8"],
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_in_the_docs_is_that_of_the_stored_counts(row: str) -> None:
    cells = [" / ".join(f"{counts[name].per_weight:.1f}" for name in ROWS[row]) for counts in STORED.values()]
    assert f"| {row} | {' | '.join(cells)} |" in (ROOT / "docs" / "cuda.md").read_text()


def test_stored_counts_are_within_what_memory_leaves_time_for() -> None:
    """Goals for an H100 or H200. What falls short of them stands in docs/cuda.md, with the reason."""
    goals = {"quantize": 24, "linear, 1": 3.2, "linear, 2": 3.2, "linear, 4": 3.6}
    for architecture, counts in STORED.items():
        for name, count in counts.items():
            goal = next((most for what, most in goals.items() if name.startswith(what)), None)
            if goal is not None:
                assert count.per_weight <= goal, (architecture, name)


def test_hot_kernels_keep_all_in_registers(built: tuple[str, dict[str, Function]]) -> None:
    """But for the product from three tiles of activations on."""
    spilled = {name for name, count in cuda_budget.measure(built[1]).items() if count.on_stack}
    assert spilled <= {"linear, 4 tiles, arranged", "linear, 8 tiles, arranged"}


def test_what_is_read_and_written_in_bulk_moves_16_bytes_at_a_time(built: tuple[str, dict[str, Function]]) -> None:
    functions = built[1]
    for name, wanted in (
        ("quantize_octets<8, 2, float>", "LDG.E.128"),
        ("quantize_octets<8, 4, BFloat16>", "LDG.E.128"),
        ("dequantize_vectors<2, true, float>", "STG.E.EF.128"),
        ("dequantize_vectors<2, true, BFloat16>", "STG.E.EF.128"),
        ("multiply_few<2, 1, false, BFloat16>", "LDG.E.EF.128"),
    ):
        assert any(wanted in line.text for line in functions[name].lines), (name, wanted)


def test_only_float64_and_the_sums_of_a_survey_take_double_precision(
    built: tuple[str, dict[str, Function]],
) -> None:
    double = ("DADD", "DMUL", "DFMA", "DSETP", r"F2F\.F(32|64)\.F(32|64)")
    doubles = {name for name, function in built[1].items() if any(line.is_one(*double) for line in function.lines)}
    assert doubles
    assert {name for name in doubles if "double" not in name and "survey" not in name} == set()


def test_reader_of_machine_code_finds_the_loop_and_counts_what_is_in_it() -> None:
    texts = [
        "MOV R1, R2",
        "FFMA R0, R1, R2, R3",
        "@P0 BRA 0x60",
        "HMMA.16816.F32 R4, R8",
        "@!P1 BRA 0x10",
        "NOP",
        "EXIT",
    ]
    lines = tuple(Line(16 * k, text) for k, text in enumerate(texts))
    function = Function("f", lines, 40)
    assert [line.address for line in function.loop("HMMA.16816.F32")] == [16, 32, 48, 64]
    assert function.loop("IMAD") == lines
    assert function.count(function.loop("HMMA.16816.F32"), 8) == Count(0.5, 40)
    assert function.count(lines, 1).per_weight == 6
