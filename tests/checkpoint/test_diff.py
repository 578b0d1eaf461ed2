"""diff: one flipped nibble in a directory is found, and said where."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from squish_nf4 import _C
from squish_nf4.checkpoint.audit.compare import FIRST_FEW, Differences, Place, compare_arrays
from squish_nf4.checkpoint.audit.diff import TensorDiff, diff
from squish_nf4.commands.cli import app
from tests.support.directories import PACKED, SCALES, compress, write_foreign_dir, write_small_dir
from tests.support.processes import assert_one_sentence, squish


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal directories, to change the second."""
    a = write_small_dir(tmp_path / "a")
    return a, Path(shutil.copytree(a, tmp_path / "b"))


def store(path: Path, stem: str, array: np.ndarray) -> None:
    np.save(path / "tensors" / f"{stem}.npy", array)


def test_a_directory_is_the_same_as_its_copy(pair: tuple[Path, Path]) -> None:
    report = diff(*pair)
    assert report.same
    assert report.equal == ("a.weight", "a.bias", "ids")


def test_compression_is_no_difference(pair: tuple[Path, Path]) -> None:
    for file in sorted((pair[1] / "tensors").glob("*.npy")):
        compress(file)
    assert diff(*pair).same


@pytest.mark.parametrize("column", [0, 1, 14, 31])
@pytest.mark.parametrize("row", [0, 4, 5])
def test_one_flipped_nibble_is_found_wherever_it_is(pair: tuple[Path, Path], row: int, column: int) -> None:
    packed = PACKED.copy()
    packed[row, column // 2] ^= 0x50 if column % 2 else 0x05
    store(pair[1], "a__weight__nf4", packed)
    report = diff(*pair)
    assert not report.same
    assert report.equal == ("a.bias", "ids")
    index = int(PACKED[row, column // 2]) >> 4 * (column % 2) & 15
    scale = SCALES[row, column // 8]
    weights = [float(np.float32(_C.codebook()[n]) * scale) for n in (index, index ^ 5)]
    place = Place((row // 3, row % 3, column), index, index ^ 5, *weights)
    assert report.different == (TensorDiff("a.weight", None, [Differences("index", 1, [place])]),)


def test_a_scale_that_differs_is_found(pair: tuple[Path, Path]) -> None:
    scales = SCALES.copy()
    scales[3, 2] = np.nextafter(scales[3, 2], np.float32(np.inf))
    store(pair[1], "a__weight__s_nf4", scales)
    [found] = diff(*pair).different
    values = float(SCALES[3, 2]), float(scales[3, 2])
    assert list(found.differences) == [Differences("scale", 1, [Place((3, 2), *values, *values)])]


def test_the_sign_of_a_zero_is_a_difference_and_a_nan_is_itself(pair: tuple[Path, Path]) -> None:
    for path, zero in zip(pair, (0.0, -0.0), strict=True):
        store(path, "a__bias__pt", np.array([zero, np.nan, 1], np.float16))
    [found] = diff(*pair).different
    assert list(found.differences) == [Differences("value", 1, [Place((0,), 0.0, -0.0, 0.0, -0.0)])]


def test_many_differences_are_counted_and_the_first_shown(pair: tuple[Path, Path]) -> None:
    store(pair[1], "a__weight__nf4", PACKED ^ 0xFF)
    [found] = diff(*pair).different
    [indices] = found.differences
    assert indices.count == PACKED.size * 2
    assert [place.at for place in indices.first] == [(0, 0, column) for column in range(FIRST_FEW)]


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.uint16, np.float16, np.float32, np.int64, np.complex64, complex]
)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
def test_values_of_every_type_and_shape_are_compared(dtype: type, shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, dtype)
    assert compare_arrays(a, a.copy()) == []
    if a.size:
        b = a.copy()
        b[(-1,) * a.ndim] = 1
        [found] = compare_arrays(a, b)
        assert (found.count, found.first[0].at) == (1, tuple(n - 1 for n in shape))


def test_a_place_far_into_a_large_tensor_is_found(tmp_path: Path) -> None:
    """Beyond the first tile that is looked at."""
    packed, scales = np.zeros((300, 8192), np.uint8), np.ones((300, 4), np.float32)
    for name in ("a", "b"):
        write_foreign_dir(tmp_path / name, {"w__nf4": packed, "w__s_nf4": scales}, {"w": "w"})
        packed[299, 8191], scales[298, 1] = 0x10, 2
    [found] = diff(tmp_path / "a", tmp_path / "b").different
    indices, of_scales = found.differences
    assert indices.first == [Place((299, 16383), 0, 1, -1.0, float(np.float32(_C.codebook()[1])))]
    assert of_scales.first == [Place((298, 1), 1, 2, 1, 2)]


def test_other_forms_are_named_and_not_compared(pair: tuple[Path, Path]) -> None:
    store(pair[1], "a__weight__s_nf4", np.ones((6, 2), np.float32))
    store(pair[1], "a__bias__pt", np.ones(3, np.float32))
    weight, bias = diff(*pair).different
    assert weight.form == (
        "NF4 in groups of 8, 2 x 3 x 32, 6 rows of 32",
        "NF4 in groups of 16, 2 x 3 x 32, 6 rows of 32",
    )
    assert bias.form == ("float16, 3", "float32, 3")
    assert (weight.differences, bias.differences) == ((), ())


def test_names_of_one_side_are_listed(pair: tuple[Path, Path]) -> None:
    (pair[0] / "manifest.json").write_text('{"a.weight": "a__weight", "ids": "ids"}')
    (pair[1] / "manifest.json").write_text('{"a.weight": "a__weight", "a.bias": "a__bias"}')
    report = diff(*pair)
    assert (report.only_a, report.only_b, report.equal) == (("ids",), ("a.bias",), ("a.weight",))


def test_the_command_prints_the_place_and_ends_like_diff(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["diff", *map(str, pair)])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "the same: 3 tensors, every bit\n", "")
    packed = PACKED.copy()
    packed[4, 7] ^= 0x10
    store(pair[1], "a__weight__nf4", packed)
    store(pair[1], "ids__pt", np.arange(4).reshape(1, 4) * 2)
    done = CliRunner().invoke(app, ["diff", *map(str, pair)])
    assert (done.exit_code, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "a.weight: 1 index differs"
    index = int(PACKED[4, 7]) >> 4
    assert lines[1].startswith(f"  element [1, 1, 15]: index {index} -> {index ^ 1}, weight ")
    assert lines[2:6] == [
        "ids: 3 values differ",
        "  row 0, column 1: 1 -> 2",
        "  row 0, column 2: 2 -> 4",
        "  row 0, column 3: 3 -> 6",
    ]
    assert lines[6] == "2 tensors different, 0 on one side only, 1 the same"
    assert_one_sentence(squish("diff", pair[0], tmp_path / "absent"), "absent is not a directory", status=2)
