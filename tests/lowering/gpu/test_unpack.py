"""The assembly that unpacks codes means what the format table says, for every byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp4compile.formats import of_width
from fp4compile.lowering.unpack import (
    float8_ptx,
    float16_ptx,
    float16_words,
    int8_ptx,
    int8_words,
    table,
)

FORMATS = pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
BYTES = np.arange(256, dtype=np.uint8)


def emulated(assembly, registers, words=()):
    """What the bytes 0 to 255 become, in the order of the registers that hold them."""
    from fp4compile.lowering.testing.ptx import emulate

    packed = BYTES.view(np.uint32)
    # As tl.inline_asm_elementwise hands a word on for each of the four bytes.
    tables = [np.full_like(packed, word & 0xFFFFFFFF) for word in words for _ in range(4)]
    return np.stack(emulate(assembly, registers, [packed, *tables]), axis=-1).flatten()


def expected(fmt):
    return np.array(fmt.integer_values)[np.stack((BYTES & 15, BYTES >> 4), axis=-1)].flatten()


@FORMATS
def test_int8_assembly(fmt):
    assert np.array_equal(emulated(int8_ptx(int8_words(fmt)), 2).view(np.int8), expected(fmt))


@FORMATS
def test_tables_may_be_operands(fmt):
    found = emulated(int8_ptx(None), 2, int8_words(fmt)).view(np.int8)
    assert np.array_equal(found, expected(fmt))
    bits = emulated(float16_ptx(None), 4, float16_words(fmt, torch.float16)).view(np.float16)
    assert np.array_equal(bits, expected(fmt))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_assembly(fmt, dtype):
    found = torch.from_numpy(emulated(float8_ptx(fmt, dtype), 2).view(np.uint8)).view(dtype)
    assert np.array_equal(found.float().numpy(), expected(fmt))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float16_assembly(fmt, dtype):
    found = torch.from_numpy(
        emulated(float16_ptx(float16_words(fmt, dtype)), 4).view(np.int16)
    ).view(dtype)
    assert np.array_equal(found.float().numpy(), expected(fmt))


@FORMATS
def test_arithmetic_table(fmt):
    magnitudes = [(table(fmt) >> 8 * code) & 255 for code in range(8)]
    assert magnitudes == list(fmt.magnitudes)


def test_an_unknown_instruction_is_refused():
    from fp4compile.lowering.testing.ptx import emulate

    with pytest.raises(NotImplementedError, match=r"bfi\.b32"):
        emulate("{ bfi.b32 $0, $1, $1, 4, 8; }", 1, [BYTES.view(np.uint32)])
