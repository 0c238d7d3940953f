"""Packed FP4 codes to numbers in a Triton kernel: texts of two forms of one function.

``*_ptx``: NVIDIA assembly for ``tl.inline_asm_elementwise`` with ``pack=4``: a register of four
bytes, eight codes, to registers with the values of the four low and of the four high nibbles. A
permutation of bytes (``prmt``) looks four codes up at a time in a table of eight bytes.
``table``: for shifts of a constant, on any GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from fp4compile.formats import FloatFormat

HALF = 8  # magnitude codes of a format of 4 bits

# Selectors of prmt; a nibble with its high bit set spreads the sign of the byte that it selects.
_SIGNS = ("0xD9C8", "0xFBEA")  # of (low0, high0, low1, high1) and (low2, high2, low3, high3)
_EVEN, _ODD = "0x6420", "0x7531"
_LOW_PAIR, _HIGH_PAIR = "0x6240", "0x7351"

# lop3 tables: f(0xF0, 0xCC, 0xAA) for operands a, b, c.
_SELECT = 0xF0 & 0xCC | ~0xF0 & 0xAA & 0xFF  # a ? b : c
_OR_MASKED = 0xF0 & 0xCC | 0xAA  # (a & b) | c


def int8_ptx(fmt: FloatFormat) -> str:
    """$2 four bytes; $0 int8 values of the low nibbles, $1 of the high ones. 13 instructions."""
    positive = fmt.integer_values[:HALF]
    return _bytes_ptx(positive, [-value for value in positive])


def float8_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """As :func:`int8_ptx`, to the bytes of an 8-bit float type that has a sign bit and zeros."""
    values = torch.tensor(fmt.integer_values[:HALF], dtype=torch.float32)
    positive = values.to(dtype).view(torch.uint8).tolist()
    return _bytes_ptx(positive, [value | 128 for value in positive])


def _bytes_ptx(positive: Sequence[int], negative: Sequence[int]) -> str:
    lines = [
        *_codes(),
        *(f"prmt.b32 p{i}, {_words(positive)}, c{i}" for i in (0, 1)),
        *(f"prmt.b32 n{i}, {_words(negative)}, c{i}" for i in (0, 1)),
        *_masks(),
        *(f"lop3.b32 v{i}, s{i}, n{i}, p{i}, {_SELECT:#x}" for i in (0, 1)),
        f"prmt.b32 $0, v0, v1, {_EVEN}",
        f"prmt.b32 $1, v0, v1, {_ODD}",
    ]
    return _block("c0, c1, l, s0, s1, p0, p1, n0, n1, v0, v1", lines)


def float16_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """$4 four bytes; $0, $1 values of the low nibbles in a 16-bit float, $2, $3 of the high ones.

    A float is looked up as two bytes; the sign goes into the upper one. 15 instructions.
    """
    values = torch.tensor(fmt.integer_values[:HALF]).to(dtype).view(torch.int16).tolist()
    upper, lower = _words([value >> 8 for value in values]), _words(values)
    lines = [
        *_codes(source="$4"),
        *(f"prmt.b32 u{i}, {upper}, c{i}" for i in (0, 1)),
        *(f"prmt.b32 d{i}, {lower}, c{i}" for i in (0, 1)),
        *_masks(source="$4"),
        *(f"lop3.b32 u{i}, s{i}, 0x80808080, u{i}, {_OR_MASKED:#x}" for i in (0, 1)),
        # u and d hold (low, high, low, high): bytes 0 and 2 of both are the pair of low nibbles.
        *(f"prmt.b32 ${i}, d{i}, u{i}, {_LOW_PAIR}" for i in (0, 1)),
        *(f"prmt.b32 ${2 + i}, d{i}, u{i}, {_HIGH_PAIR}" for i in (0, 1)),
    ]
    return _block("c0, c1, l, s0, s1, u0, u1, d0, d1", lines)


def table(fmt: FloatFormat) -> int:
    """The int8 magnitudes of the eight magnitude codes, code 0 lowest, for the arithmetic form:

    ``((table >> 8 * (code & 7)) & 255)``, negated where ``code >= 8``.
    """
    word: int = struct.unpack("<q", struct.pack("<8b", *fmt.integer_values[:HALF]))[0]
    return word


def _codes(source: str = "$2") -> list[str]:
    """c0, c1: four magnitude codes each, as selectors (prmt reads the lower 16 bits)."""
    return [f"and.b32 c0, {source}, 0x77777777", "shr.u32 c1, c0, 16"]


def _masks(source: str = "$2") -> list[str]:
    """s0, s1: 0xFF where a code of c0, c1 is negative."""
    return [
        f"shl.b32 l, {source}, 4",
        *(f"prmt.b32 s{i}, l, {source}, {selector}" for i, selector in enumerate(_SIGNS)),
    ]


def _words(values: Sequence[int]) -> str:
    """Eight bytes as the two words that prmt reads them from."""
    low, high = struct.unpack("<2I", bytes(value & 255 for value in values))
    return f"{low:#010x}, {high:#010x}"


def _block(registers: str, lines: Sequence[str]) -> str:
    return "{ .reg .b32 " + registers + "; " + "; ".join(lines) + "; }"
