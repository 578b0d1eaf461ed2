"""All 2,130,706,434 floats of [-1, 1], on every CPU path, against the definition: tests/native/every_float.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from squish_nf4 import _C
from tests.support import reference
from tests.support.compiling import NATIVE, compile_objects, link
from tests.support.processes import run

pytestmark = pytest.mark.builds

EVERY_FLOAT = 2_130_706_434


def test_every_float_of_minus_one_to_one_gets_the_index_of_the_nearest_level(
    tmp_path: Path, kernel_objects: dict[str, Path]
) -> None:
    objects = [*kernel_objects.values(), *compile_objects(tmp_path, [NATIVE / "every_float.cpp"], ["-O3"])]
    objects += compile_objects(tmp_path, [NATIVE / "definition.cpp"], ["-O3", "-march=native"])
    program = link(tmp_path / "every_float", objects)

    done = run([program, *(repr(float(level)) for level in reference.LEVELS)])

    assert done.returncode == 0, done.stderr + done.stdout
    paths = [isa for isa in _C.cpu_isas(available=True) if isa != "avx512_bf16"]  # it encodes as avx512 does
    assert done.stdout.splitlines() == [f"{path} {EVERY_FLOAT} 0" for path in paths]
