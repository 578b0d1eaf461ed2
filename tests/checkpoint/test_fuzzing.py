"""The fuzzer's targets on the seeds that it found worth keeping, and on what hypothesis makes of sound files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing.targets import TARGETS, directory, npy_file, npy_header, zst_file
from tests.support.cases import EXAMPLES
from tests.support.directories import header, npy

CORPUS = Path(__file__).parents[1] / "fuzzing" / "corpus"
SEEDS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_seeds_and_every_seed_a_target() -> None:
    assert {path.parent.name for path in SEEDS} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_or_refused(name: str) -> None:
    for seed in SEEDS:
        if seed.parent.name == name:
            TARGETS[name](seed.read_bytes())


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """Sound .npy files of small arrays."""
    dtype = draw(st.sampled_from(["<f4", ">f4", "<f2", "|u1", "<i8", "|b1", "<c8"]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype, order=draw(st.sampled_from("CF"))))
    return file.getvalue()


@st.composite
def changed(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """Sound bytes with a few of them replaced, left out or added."""
    data = draw(sound)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 4)) :]
    return data


FUZZED = settings(EXAMPLES, max_examples=150)
NUMBERS = st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1]))
HEADERS = st.builds(
    lambda descr, shape, data: npy(header(descr, f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"), data),
    st.sampled_from(["<f4", "|u1", "|O", "<U3", "<f2", "<c16", "|b1"]),
    st.lists(NUMBERS, max_size=4),
    st.binary(max_size=64),
)


@given(changed(arrays()) | changed(HEADERS))
@FUZZED
def test_any_header_is_read_as_numpy_does_or_refused(data: bytes) -> None:
    npy_header(data)


@given(changed(arrays()) | changed(HEADERS))
@FUZZED
def test_any_npy_file_is_read_as_numpy_does_or_refused(data: bytes) -> None:
    npy_file(data)


@given(changed((arrays() | HEADERS).map(zstandard.compress)) | changed(arrays() | HEADERS).map(zstandard.compress))
@FUZZED
def test_any_zst_file_is_read_or_refused(data: bytes) -> None:
    zst_file(data)


@given(st.lists(st.binary(min_size=5, max_size=5), min_size=1, max_size=6).map(b"".join))
@FUZZED
def test_any_edits_of_a_directory_are_read_or_refused(data: bytes) -> None:
    directory(data)
