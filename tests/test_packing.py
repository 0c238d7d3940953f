"""Packing is a bijection for every width and any K."""

from __future__ import annotations

import pytest
import torch

from fp4compile.formats import FORMATS
from fp4compile.numerics import decode
from fp4compile.packing import pack, packed_size, unpack, unpack_values

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 33)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_unpack_undoes_pack(fmt, length):
    codes = torch.randint(0, 2**fmt.bits, (3, length), dtype=torch.uint8)
    packed = pack(codes, fmt.bits)
    assert packed.shape == (3, packed_size(length, fmt.bits))
    assert torch.equal(unpack(packed, fmt.bits, length), codes)
    assert torch.equal(unpack_values(packed, fmt, length), decode(codes, fmt))


def test_all_16_codes_in_both_nibbles():
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack((low.flatten(), high.flatten()), dim=-1).to(torch.uint8)
    packed = pack(codes, 4)
    assert torch.equal(packed[:, 0], (codes[:, 0] | codes[:, 1] << 4))
    assert torch.equal(unpack(packed, 4, 2), codes)


@pytest.mark.parametrize(
    ("bits", "length", "size"), [(4, 10, 5), (4, 9, 5), (6, 8, 6), (6, 5, 6), (8, 3, 3)]
)
def test_no_byte_is_wasted(bits, length, size):
    assert packed_size(length, bits) == size
