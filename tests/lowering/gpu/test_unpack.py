"""The assembly that unpacks codes means what the format table says, for every byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp4compile.formats import of_width
from fp4compile.lowering.unpack import (
    float8_ptx,
    float16_ptx,
    float16_tables_ptx,
    float16_words,
    int8_products_ptx,
    int8_ptx,
    int8_words,
    table,
)

FORMATS = pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
BYTES = np.arange(256, dtype=np.uint8)
E4M3_SCALES = (2.0**-9, 7 * 2.0**-9, 0.8125, 1.875, 448.0)


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
    assert np.array_equal(emulated(int8_ptx(fmt), 2).view(np.int8), expected(fmt))


@FORMATS
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")], ids=str
)
def test_tables_and_factors_may_be_operands(fmt, dtype, name):
    factors = torch.tensor(E4M3_SCALES, dtype=dtype)
    bits = factors.view(torch.int16).to(torch.int64).numpy() & 0xFFFF
    words = float16_words(fmt, dtype)
    for factor, low in zip(factors, bits, strict=True):
        found = emulated(float16_tables_ptx(name), 4, [*words, int(low) * 0x10001]).view(np.int16)
        values = torch.from_numpy(found).view(dtype).float()
        assert np.array_equal(values.numpy(), expected(fmt) * float(factor))


@FORMATS
@pytest.mark.parametrize("operands", [False, True], ids=["constants", "operands"])
def test_products(fmt, operands):
    from fp4compile.lowering.testing.ptx import emulate

    generator = np.random.default_rng(0)
    packed = BYTES.view(np.uint32)
    x = generator.integers(-128, 128, (packed.size, 8), dtype=np.int8)
    low, high = (np.ascontiguousarray(part).view(np.uint32)[:, 0] for part in (x[:, :4], x[:, 4:]))
    begin = generator.integers(-1000, 1000, packed.size, dtype=np.int32)
    tables = [np.full_like(packed, word & 0xFFFFFFFF) for word in int8_words(fmt)]
    assembly = int8_products_ptx(None if operands else int8_words(fmt))
    registers = [packed, low, high, begin.view(np.uint32), *(tables if operands else [])]
    (found,) = emulate(assembly, 1, registers)
    products = expected(fmt).reshape(-1, 8) * x.astype(np.int64)
    assert np.array_equal(found.view(np.int32), begin + products.sum(axis=1))


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
