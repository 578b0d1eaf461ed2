"""Headers of .npy files: every one that numpy writes is understood, and every other is refused unevaluated."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from squish_nf4.checkpoint.directory.npy_header import LONGEST_HEADER, Header, read_header
from tests.support.cases import EXAMPLES
from tests.support.directories import header, npy


def read(data: bytes) -> Header:
    file = io.BytesIO(data)
    found = read_header(file.read)
    assert file.tell() == found.start  # and no byte more
    return found


NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
)


@settings(EXAMPLES)
@given(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4), st.booleans())
def test_every_header_that_numpy_writes_is_understood(
    dtype: np.dtype[np.generic], shape: tuple[int, ...], fortran: bool
) -> None:
    array = np.zeros(shape, dtype, order="F" if fortran else "C")
    file = io.BytesIO()
    np.save(file, array)
    found = read(file.getvalue())
    assert (found.dtype, found.shape, found.nbytes) == (dtype, shape, array.nbytes)
    assert found.start + found.nbytes == len(file.getvalue())
    assert found.fortran == (not array.flags.c_contiguous)


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }          \n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)}",
        '{"shape":(3,4,),"fortran_order":False,"descr":"<f4"}',
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 4L), }\n",
    ],
    ids=["numpy", "compact", "another order and quotes", "Python 2"],
)
def test_other_writers_headers_are_understood(text: str, version: bytes) -> None:
    found = read(npy(text, version=version))
    assert (found.dtype, found.shape, found.fortran) == (np.float32, (3, 4), False)


REFUSED = {
    "nothing": (b"", r"does not begin with \\x93NUMPY"),
    "a pickle": (b"\x80\x04N.aaaaaaaa", r"does not begin with \\x93NUMPY"),
    "version 0": (npy(header("<f4", "(3,)"), version=b"\0\0"), r"of .npy version 0\.0; 1 to 3 are read"),
    "version 9": (npy(header("<f4", "(3,)"), version=b"\x09\1"), r"of .npy version 9\.1"),
    "cut off": (npy(header("<f4", "(3,)"))[:40], r"ends within its header \(30 of 57 bytes\)"),
    "too long": (npy(header("<f4", "(3,)") + " " * LONGEST_HEADER), "declares a header of 4153 bytes; at most 4096"),
    "a header of 4 GB": (b"\x93NUMPY\2\0\xff\xff\xff\xff", "declares a header of 4294967295 bytes"),
    "objects": (npy(header("|O", "(3,)")), "holds Python objects: that is a pickle"),
    "records": (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}"), "holds records"),
    "text": (npy(header("<U4", "(3,)")), "holds '<U4', which is no number type"),
    "time": (npy(header("<M8[s]", "(3,)")), "which is no number type"),
    "void": (npy(header("|V2", "(3,)")), "which is no number type"),
    "an old name of a string": (npy(header("c1", "(3,)")), "which is no number type"),
    "three bytes": (npy(header("<f3", "(3,)")), "which is no number type"),
    "several": (npy(header("f4,f4", "(3,)")), "which is no number type"),
    "no text": (npy("{'descr': True, 'fortran_order': False, 'shape': (3,)}"), "which is no number type"),
    "a number as the shape": (npy(header("<f4", "(3)")), r"shape is \(3\)"),
    "a negative shape": (npy(header("<f4", "(-3,)")), "is not understood"),
    "a shape of 2**63": (npy(header("<f4", f"({2**63},)")), "which no array can have"),
    "a product of 2**64": (npy(header("|u1", f"({2**32}, {2**32})")), "which no array can have"),
    "a product hidden by a 0": (npy(header("|u1", f"(0, {2**62}, 9)")), "which no array can have"),
    "digits without end": (npy(header("<f4", f"({'9' * 3000},)")), "which no array can have"),
    "65 dimensions": (npy(header("<f4", f"({'1, ' * 65})")), "declares 65 dimensions; at most 64 are read"),
    "a field twice": (npy("{'shape': (1,), 'shape': (2,), }"), "says shape twice"),
    "a field more": (npy(header("<f4", "(3,)")[:-1] + "'more': True}"), "is not understood"),
    "a field less": (npy("{'descr': '<f4', 'shape': (3,)}"), "is not understood"),
    "an order of text": (npy("{'descr': '<f4', 'fortran_order': 'a', 'shape': (3,)}"), "whose fortran_order is 'a'"),
    "no comma": (npy("{'descr': '<f4' 'fortran_order': False, 'shape': (3,)}"), "is not understood"),
    "more behind it": (npy(header("<f4", "(3,)") + "()"), "is not understood"),
    "a call": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': print(), }"), "is not understood"),
    "brackets without end": (npy("(" * 4000), "is not understood"),
    "an empty header": (npy(""), "is not understood"),
    "other bytes": (npy(b"\xff" * 60, version=b"\3\0"), "is not understood"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_header_that_is_not_wanted_is_refused_with_the_cause(what: str) -> None:
    data, text = REFUSED[what]
    with pytest.raises(ValueError, match=text):
        read(data)


@settings(EXAMPLES)
@given(st.text(alphabet="{}()[]'\",: \n0123456789LTrueFalsdecortn_hp<>|=Of4u1\\", max_size=120))
def test_any_text_is_refused_or_understood(text: str) -> None:
    try:
        found = read(npy(text))
    except ValueError:
        return
    assert found.dtype.kind in "biufc"
    assert found.nbytes < 2**63
