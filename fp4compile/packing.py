"""Packed layout of codes: a little-endian bit stream along the last dimension.

4 bits: two codes per byte, the low nibble holds the even k. 6 bits: four codes in three bytes.
8 bits: one code per byte. A row whose K is not a multiple of the group is padded with code 0.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.blocks import block_scales, in_second_format, per_channel
from fp4compile.formats import FloatFormat, alternatives
from fp4compile.numerics import decode, value_table


def codes_per_group(bits: int) -> int:
    """Codes that fill a whole number of bytes: 2 for 4 bits, 4 for 6, 1 for 8."""
    return 8 // gcd(8, bits)


def packed_size(length: int, bits: int) -> int:
    """Bytes of one packed row of ``length`` codes."""
    group = codes_per_group(bits)
    return -(-length // group) * group * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[..., K]`` to uint8 ``[..., packed_size(K, bits)]``."""
    group = codes_per_group(bits)
    padded = F.pad(codes, (0, -codes.shape[-1] % group)).unflatten(-1, (-1, group))
    word = torch.zeros(padded.shape[:-1], dtype=torch.int32, device=codes.device)
    for position in range(group):
        word = word | padded[..., position].to(torch.int32) << (position * bits)
    parts = [(word >> (8 * byte)) & 0xFF for byte in range(group * bits // 8)]
    return torch.stack(parts, dim=-1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """uint8 ``[..., packed_size(length, bits)]`` to uint8 codes ``[..., length]``."""
    group = codes_per_group(bits)
    parts = packed.unflatten(-1, (-1, group * bits // 8)).to(torch.int32)
    word = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=packed.device)
    for byte in range(parts.shape[-1]):
        word = word | parts[..., byte] << (8 * byte)
    mask = 2**bits - 1
    codes = [(word >> (position * bits)) & mask for position in range(group)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :length].to(torch.uint8)


@cache
def _pair_table(fmt: FloatFormat, device: torch.device) -> Tensor:
    """float32 ``[256, 2]``: the two integer values of every byte of packed 4-bit codes."""
    values = value_table(fmt, device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)


def unpack_values(packed: Tensor, fmt: FloatFormat, length: int) -> Tensor:
    """float32 integer values ``[..., length]`` of packed codes."""
    if fmt.bits == 4:
        pairs = _pair_table(fmt, packed.device).index_select(0, packed.flatten().to(torch.int32))
        return pairs.view(*packed.shape[:-1], -1)[..., :length]
    return decode(unpack(packed, fmt.bits, length), fmt)


def unpack_blocks(
    packed: Tensor,
    scale_codes: Tensor,
    outer: Tensor,
    format: str,
    block_size: int,
    length: int,
) -> Tensor:
    """float32 weight ``[..., length]`` of packed codes with block scales (``blocks.py``)."""
    first, *second = alternatives(format)
    values = unpack_values(packed, first, length)
    if second:
        flag = per_channel(in_second_format(scale_codes), block_size, length)
        values = torch.where(flag, unpack_values(packed, second[0], length), values)
    return values * per_channel(block_scales(scale_codes, outer), block_size, length)
