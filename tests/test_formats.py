"""Laws of the format table, for every format and every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import FOREIGN

from fp4compile.errors import UnknownFormatError
from fp4compile.formats import FORMATS, INT8_MAX, by_name, of_width

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@ALL
def test_magnitudes_ascend_from_zero_in_integer_steps(fmt):
    assert fmt.magnitudes[:2] == (0, 1)
    assert list(fmt.magnitudes) == sorted(set(fmt.magnitudes))


@ALL
def test_every_code_has_the_value_of_the_minifloat_definition(fmt):
    bias = fmt.default_bias
    for code, integer in enumerate(fmt.magnitudes):
        exponent, mantissa = divmod(code, 2**fmt.mantissa_bits)
        fraction = mantissa / 2**fmt.mantissa_bits
        value = (
            fraction * 2.0 ** (1 - bias)
            if exponent == 0
            else (1 + fraction) * 2.0 ** (exponent - bias)
        )
        assert integer * fmt.default_step == value


@ALL
def test_signs_mirror(fmt):
    half = 2 ** (fmt.bits - 1)
    values = fmt.integer_values
    assert len(values) == 2 * half
    assert values[half:] == tuple(-value for value in values[:half])


@ALL
def test_shifted_magnitudes_stay_in_their_operand(fmt):
    if fmt.fits_int8:
        assert fmt.max_integer << fmt.max_shift <= INT8_MAX < fmt.max_integer << (fmt.max_shift + 1)
    else:
        assert fmt.max_shift == 2**fmt.exponent_bits - 1


@pytest.mark.parametrize("name", FOREIGN)
def test_all_codes_match_ml_dtypes(name):
    fmt = by_name(name)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    theirs = codes.view(FOREIGN[name]).astype(np.float64)
    finite = np.isfinite(theirs)
    ours = np.array(fmt.integer_values) * fmt.default_step
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    assert (~finite).sum() == 2 * fmt.reserved_codes


@pytest.mark.parametrize("name", TORCH)
def test_all_codes_match_torch_float8(name):
    fmt = by_name(name)
    theirs = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).to(torch.float64)
    finite = theirs.isfinite()
    ours = torch.tensor(fmt.integer_values, dtype=torch.float64) * fmt.default_step
    assert torch.equal(ours[finite], theirs[finite])


def test_uniform_formats_are_the_integers():
    assert by_name("e1m2").magnitudes == tuple(range(8))
    assert by_name("e1m6").magnitudes == tuple(range(128))


def test_the_4_bit_table_of_the_paper():
    assert by_name("E2M1").magnitudes == (0, 1, 2, 3, 4, 6, 8, 12)
    assert by_name("e3m0").magnitudes == (0, 1, 2, 4, 8, 16, 32, 64)
    assert {fmt.name for fmt in of_width(4)} == {"e1m2", "e2m1", "e3m0"}


def test_unknown_formats_are_named_with_the_known_ones():
    with pytest.raises(UnknownFormatError, match=r"'e9m9'.*e2m1"):
        by_name("e9m9")
    with pytest.raises(UnknownFormatError, match="5 bits"):
        of_width(5)
