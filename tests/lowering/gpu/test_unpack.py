"""The assembly that unpacks codes means what the format table says, for every byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp4compile.formats import of_width
from fp4compile.lowering.unpack import float16_ptx, int8_ptx, table

FORMATS = pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
BYTES = np.arange(256, dtype=np.uint8)


def values(codes, fmt):
    return np.array(fmt.integer_values)[codes]


@FORMATS
def test_int8_assembly(fmt):
    from fp4compile.lowering.testing.ptx import emulate

    low, high = emulate(int8_ptx(fmt), 2, [BYTES.view(np.uint32)])
    assert np.array_equal(low.view(np.int8), values(BYTES & 15, fmt))
    assert np.array_equal(high.view(np.int8), values(BYTES >> 4, fmt))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_assembly(fmt, dtype):
    from fp4compile.lowering.testing.ptx import emulate

    words = emulate(float16_ptx(fmt, dtype), 4, [BYTES.view(np.uint32)])
    for nibble, pair in ((BYTES & 15, words[:2]), (BYTES >> 4, words[2:])):
        bits = np.stack(pair, axis=-1).view(np.int16).flatten()
        found = torch.from_numpy(bits).view(dtype).float().numpy()
        assert np.array_equal(found, values(nibble, fmt))


@FORMATS
def test_arithmetic_table(fmt):
    magnitudes = [(table(fmt) >> 8 * code) & 255 for code in range(8)]
    assert magnitudes == list(fmt.magnitudes)


def test_an_unknown_instruction_is_refused():
    from fp4compile.lowering.testing.ptx import emulate

    with pytest.raises(NotImplementedError, match=r"bfi\.b32"):
        emulate("{ bfi.b32 $0, $1, $1, 4, 8; }", 1, [BYTES.view(np.uint32)])
