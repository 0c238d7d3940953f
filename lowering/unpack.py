"""Packed FP4 codes to numbers in a Triton kernel: texts of two forms of one function.

``*_ptx``: NVIDIA assembly for ``tl.inline_asm_elementwise`` with ``pack=4``: a register of four
bytes, eight codes, to registers with their values in the same order. A permutation of bytes
(``prmt``) looks four codes up at a time in a table of eight bytes.
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
_ZIP = ("0x5140", "0x7362")  # bytes 0 and 1 of two words by turns; bytes 2 and 3

# lop3 tables: f(0xF0, 0xCC, 0xAA) for operands a, b, c.
_SELECT = 0xF0 & 0xCC | ~0xF0 & 0xAA & 0xFF  # a ? b : c
_OR_MASKED = 0xF0 & 0xCC | 0xAA  # (a & b) | c


def int8_ptx(fmt: FloatFormat) -> str:
    """$2 four bytes; $0, $1 int8 values of the codes. 11 instructions in a loop."""
    positive = fmt.integer_values[:HALF]
    lines = [
        *_lookups("p", positive),
        *_lookups("n", [-value for value in positive]),
        *(f"lop3.b32 ${i}, s{i}, n{i}, p{i}, {_SELECT:#x}" for i in (0, 1)),
    ]
    return _block("p n", lines, source="$2")


def float8_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """As :func:`int8_ptx`, to an 8-bit float type that has a sign bit and zeros. 9 instructions."""
    values = torch.tensor(fmt.integer_values[:HALF], dtype=torch.float32)
    magnitudes = values.to(dtype).view(torch.uint8).tolist()
    lines = [
        *_lookups("p", magnitudes),
        *(f"lop3.b32 ${i}, s{i}, 0x80808080, p{i}, {_OR_MASKED:#x}" for i in (0, 1)),
    ]
    return _block("p", lines, source="$2")


def float16_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """$4 four bytes; $0 to $3 values of the codes in a 16-bit float.

    A float is looked up as two bytes; the sign goes into the upper one. 15 instructions in a loop.
    """
    values = torch.tensor(fmt.integer_values[:HALF]).to(dtype).view(torch.int16).tolist()
    lines = [
        *_lookups("u", [value >> 8 for value in values]),
        *_lookups("d", values),
        *(f"lop3.b32 u{i}, s{i}, 0x80808080, u{i}, {_OR_MASKED:#x}" for i in (0, 1)),
        *(f"prmt.b32 ${2 * i + j}, d{i}, u{i}, {_ZIP[j]}" for i in (0, 1) for j in (0, 1)),
    ]
    return _block("u d", lines, source="$4")


def table(fmt: FloatFormat) -> int:
    """The int8 magnitudes of the eight magnitude codes, code 0 lowest, for the arithmetic form:

    ``((table >> 8 * (code & 7)) & 255)``, negated where ``code >= 8``.
    """
    word: int = struct.unpack("<q", struct.pack("<8b", *fmt.integer_values[:HALF]))[0]
    return word


def _block(tables: str, lines: Sequence[str], source: str) -> str:
    """``lines``, with what they share before them.

    c0, c1: four magnitude codes each, as selectors (prmt reads the lower 16 bits). s0, s1: 0xFF
    where a code is negative. z: zero, but ptxas does not know that no lane is below lane 31 in
    bit 31. It would otherwise rematerialize a table's words, of which prmt takes one as a
    constant, for every look-up.
    """
    shared = [
        "mov.u32 z, %lanemask_lt",
        "shr.u32 z, z, 31",
        f"and.b32 c0, {source}, 0x77777777",
        "shr.u32 c1, c0, 16",
        f"shl.b32 l, {source}, 4",
        *(f"prmt.b32 s{i}, l, {source}, {selector}" for i, selector in enumerate(_SIGNS)),
    ]
    words = ", ".join(f"{name}0, {name}1, {name}t" for name in tables.split())
    registers = f".reg .b32 z, c0, c1, l, s0, s1, {words}"
    return "{ " + "; ".join((registers, *shared, *lines)) + "; }"


def _lookups(name: str, values: Sequence[int]) -> list[str]:
    """``{name}0``, ``{name}1``: bytes of ``values`` that c0 and c1 select."""
    low, high = struct.unpack("<2I", bytes(value & 255 for value in values))
    return [
        f"or.b32 {name}t, z, {low:#010x}",
        *(f"prmt.b32 {name}{i}, {name}t, {high:#010x}, c{i}" for i in (0, 1)),
    ]
