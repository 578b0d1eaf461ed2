"""No instruction of a CPU path stands outside that path, and a CPU path that is not there is refused."""

from __future__ import annotations

import platform
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import squish_nf4
from squish_nf4 import _C
from squish_nf4.doctor import examine as doctor
from tests.support import ROOT
from tests.support.compiling import code_without_comments, kernel_sources
from tests.support.disassembly import machine_code, require_x86_disassembler
from tests.support.helpers import ISAS, require
from tests.support.processes import run

# In 64-bit code these first bytes, perhaps after a segment or address prefix, have no other meaning.
EVEX = re.compile(r"((64|65|67|2e|3e) )*62 ")
VEX = re.compile(r"((64|65|67|2e|3e) )*c[45] ")


def needs(code: str, instruction: str) -> str:
    """The least path that may hold this instruction, as hexadecimal bytes and in words."""
    if EVEX.match(code) or instruction.startswith("k"):  # the instructions on mask registers are encoded as VEX
        return "avx512"
    return "avx2" if VEX.match(code) else "scalar"


def functions_by_need(binary: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for instruction in machine_code(binary):
        found[needs(instruction.code, instruction.text)].add(instruction.function)
    return found


@pytest.fixture(scope="module")
def objects(kernel_objects: dict[str, Path]) -> dict[str, Path]:
    require_x86_disassembler()
    return kernel_objects


@pytest.fixture(scope="module")
def op_library() -> Path:
    require_x86_disassembler()
    return Path(squish_nf4.library_path())


INSTRUCTIONS = [
    ("62 f1 7c 48 10 07 ", "vmovups (%rdi),%zmm0", "avx512"),
    ("62 f1 74 38 58 00 ", "vaddps (%rax){1to8},%ymm1,%ymm0", "avx512"),
    ("67 62 e1 7c 08 10 07 ", "vmovups (%edi),%xmm16", "avx512"),
    ("c5 f8 92 c8 ", "kmovw  %eax,%k1", "avx512"),
    ("c5 f4 58 c2 ", "vaddps %ymm2,%ymm1,%ymm0", "avx2"),
    ("c4 e2 71 b9 c2 ", "vfmadd231ss %xmm2,%xmm1,%xmm0", "avx2"),
    ("c5 f8 77 ", "vzeroupper", "avx2"),
    ("44 0f 58 fa ", "addps  %xmm2,%xmm15", "scalar"),
    ("48 8b 62 08 ", "mov    0x8(%rdx),%rsp", "scalar"),
]


@pytest.mark.parametrize(("code", "instruction", "path"), INSTRUCTIONS)
def test_reader_of_machine_code_knows_the_paths_apart(code: str, instruction: str, path: str) -> None:
    assert needs(code, instruction) == path


@pytest.mark.builds
def test_objects_hold_the_instructions_of_their_path_and_no_others(objects: dict[str, Path]) -> None:
    found = {name: set(functions_by_need(path)) for name, path in objects.items()}
    for name in ("avx512_codec", "avx512_linear", "avx512_linear_bf16"):
        assert found.pop(name) == {"scalar", "avx2", "avx512"}
    for name in ("avx2_codec", "avx2_linear", "avx2_linear_int16"):
        assert found.pop(name) == {"scalar", "avx2"}
    assert {"scalar", "dispatch", "linear"} <= set(found)
    assert set.union(*found.values()) == {"scalar"}, found


@pytest.mark.builds
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("avx2_codec", "encode_groups"),
        ("avx2_linear", "dot_products"),
        ("avx2_linear_int16", "dot_products_of_row"),
        ("avx512_codec", "encode_groups"),
        ("avx512_linear", "dot_products"),
        ("avx512_linear_bf16", "dot_products"),
    ],
)
def test_vector_objects_define_no_function_that_the_linker_could_share(
    objects: dict[str, Path], name: str, loop: str
) -> None:
    """A weak copy of an inline function, built for AVX-512, could be the one that the linker keeps for everyone."""
    lines = run(["nm", "--demangle", "--defined-only", objects[name]]).stdout.splitlines()
    kinds = {line.split(maxsplit=2)[2]: line.split(maxsplit=2)[1] for line in lines}
    functions = {symbol: kind for symbol, kind in kinds.items() if kind in "tTwWvViI"}
    assert any(loop in symbol for symbol in functions)
    assert {symbol: kind for symbol, kind in functions.items() if kind != "t"} == {}
    sections = run(["objdump", "--section-headers", objects[name]]).stdout
    assert ".text" in sections
    assert re.findall(r"\.text\S*\._Z\S+", sections) == []  # what the linker keeps one of


@pytest.mark.sweeps
def test_library_holds_vector_instructions_in_the_functions_of_their_path_alone(op_library: Path) -> None:
    found = functions_by_need(op_library)
    assert found["avx512"]
    assert {name for name in found["avx512"] if not re.search("::(Avx512|avx512::)", name)} == set()
    assert found["avx2"] - found["avx512"]
    assert {name for name in found["avx2"] if not re.search("::(Avx512|avx512::|Avx2|avx2::)", name)} == set()


def test_library_needs_no_python(op_library: Path) -> None:
    symbols = [line.split()[-1] for line in run(["nm", "-D", "--undefined-only", op_library]).stdout.splitlines()]
    assert len(symbols) > 50
    assert [symbol for symbol in symbols if re.match(r"_?Py[A-Z_]", symbol)] == []
    needed = run(["objdump", "--private-headers", op_library]).stdout
    assert "libtorch_cpu.so" in needed
    assert re.findall(r"NEEDED\s+(lib(?:python|torch_python)\S*)", needed) == []


def first_call(isa: str) -> str:
    """What a fresh process prints in which SQUISH_NF4_ISA is ``isa``: after the import, and of the first calls."""
    program = """
import torch, squish_nf4
from squish_nf4 import _C
print("imported")
packed, scales = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1)
for call in (
    lambda: squish_nf4.quantize_nf4(torch.ones(2, 8), 8),
    lambda: squish_nf4.dequantize_nf4(packed, scales, 8),
    lambda: squish_nf4.linear_nf4(torch.ones(1, 8), packed, scales, None, 8),
    lambda: torch.ops.squish.dequantize_nf4.out(packed, scales, 8, out=torch.empty(2, 8)),
    lambda: torch.ops.squish._linear_nf4_grad_x(torch.ones(1, 2), packed, scales, 8, 8),
    _C.cpu_isa,
):
    try:
        call()
        print("computed")
    except ValueError as error:
        print(str(error).splitlines()[0])
"""
    done = run([sys.executable, "-c", program], SQUISH_NF4_ISA=isa)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.sweeps
@pytest.mark.parametrize("isa", ["sse", "AVX2", "avx512 ", "avx2,avx512"])
def test_unknown_path_is_a_value_error_at_the_first_call_and_not_at_import(isa: str) -> None:
    refusal = f"SQUISH_NF4_ISA must be scalar, avx2, avx512 or avx512_bf16, got '{isa}'"
    assert first_call(isa).splitlines() == ["imported", *[refusal] * 6]


@pytest.mark.sweeps
def test_no_wish_is_the_best_path() -> None:
    assert first_call("").splitlines() == ["imported", *["computed"] * 6]


@pytest.mark.sweeps
def test_refusal_names_every_path_there_is() -> None:
    refusal = first_call("unknown")
    assert [isa for isa in ISAS if isa not in refusal] == []


def test_paths_are_listed_and_an_unknown_one_is_refused() -> None:
    available = _C.cpu_isas(available=True)
    assert (available[0], available[-1]) == ("scalar", _C.cpu_isa())
    assert [isa for isa in ISAS if isa in available] == list(available)
    assert _C.cpu_features("scalar") == ()
    with pytest.raises(ValueError, match="isa must be scalar, avx2, avx512 or avx512_bf16, got 'sse'"):
        _C.cpu_features("sse")


@pytest.mark.sweeps
def test_a_cap_leaves_the_paths_up_to_it() -> None:
    for capped in _C.cpu_isas(available=True):
        done = run([sys.executable, "-c", AVAILABLE], SQUISH_NF4_ISA=capped, PYTHONPATH=str(ROOT))
        assert done.stdout.split() == list(ISAS[: ISAS.index(capped) + 1]), done.stderr


def test_a_path_is_available_where_linux_names_all_that_it_needs() -> None:
    require("x86-64", platform.machine() == "x86_64", "the features below are those of x86-64")
    flags = doctor.cpu_model_and_features()[1]
    done = run([sys.executable, "-c", AVAILABLE], SQUISH_NF4_ISA="", PYTHONPATH=str(ROOT))
    assert done.stdout.split() == [isa for isa in ISAS if set(_C.cpu_features(isa)) <= flags], done.stderr
    assert _C.cpu_features("avx2") == ("avx2", "fma", "f16c")
    assert set(_C.cpu_features("avx512")) < set(_C.cpu_features("avx512_bf16")) == set(doctor.CPU_FEATURES)


# The words of a file's name that say what it computes; the others say for which path.
OPERATIONS = {"codec", "linear", "int16"}
REGION = re.compile(r'^SQUISH_TARGET_REGION\("(.+)"\)', re.MULTILINE)
REGIONS = {path: found for path in kernel_sources() if (found := REGION.findall(path.read_text()))}


@pytest.mark.parametrize("source", REGIONS, ids=lambda path: path.stem)
def test_what_a_file_is_compiled_for_is_asked_of_the_processor(source: Path) -> None:
    require("x86-64", platform.machine() == "x86_64", "the features below are those of x86-64")
    isa = "_".join(word for word in source.stem.split("_") if word not in OPERATIONS)
    asked = {feature.replace("_", "") for feature in _C.cpu_features(isa)}  # the compiler's names have none
    for features in REGIONS[source]:
        assert set(features.split(",")) <= asked


def test_regions_are_found() -> None:
    assert {path.stem for path in REGIONS} >= {"avx2_codec", "avx2_linear_int16", "avx512_linear_bf16"}


def test_paths_are_named_in_the_table_alone() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    sources += (ROOT / "squish_nf4").rglob("*.py")
    name = re.compile("|".join(f'"{isa}"' for isa in ISAS if isa != "scalar"))
    naming = {path.relative_to(ROOT).as_posix() for path in sources if name.search(code_without_comments(path))}
    assert naming == {"csrc/cpu/dispatch.cpp"}


AVAILABLE = "from squish_nf4 import _C; print(*_C.cpu_isas(available=True))"
