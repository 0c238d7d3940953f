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


# The two tables that a look-up takes, each as the two words of its eight bytes.
Words = tuple[int, int, int, int]


def int8_ptx(words: Words | None) -> str:
    """$2 four bytes; $0, $1 int8 values of the codes. 11 instructions in a loop.

    ``words``: of :func:`int8_words`. None: they are operands, each four times, from $3 on.
    """
    lines = [
        *_lookups("p", words and words[:2], 3),
        *_lookups("n", words and words[2:], 11),
        *(f"lop3.b32 ${i}, s{i}, n{i}, p{i}, {_SELECT:#x}" for i in (0, 1)),
    ]
    return _block("p n", lines, source="$2")


def int8_words(fmt: FloatFormat) -> Words:
    """The values of the magnitude codes, and the same negated."""
    positive = fmt.integer_values[:HALF]
    return *_words(positive), *_words([-value for value in positive])


def float8_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """As :func:`int8_ptx`, to an 8-bit float type that has a sign bit and zeros. 9 instructions."""
    values = torch.tensor(fmt.integer_values[:HALF], dtype=torch.float32)
    magnitudes = values.to(dtype).view(torch.uint8).tolist()
    lines = [
        *_lookups("p", _words(magnitudes)),
        *(f"lop3.b32 ${i}, s{i}, 0x80808080, p{i}, {_OR_MASKED:#x}" for i in (0, 1)),
    ]
    return _block("p", lines, source="$2")


def float16_ptx(words: Words | None) -> str:
    """$4 four bytes; $0 to $3 values of the codes in a 16-bit float.

    A float is looked up as two bytes; the sign goes into the upper one. 15 instructions in a loop.
    ``words``: of :func:`float16_words`. None: they are operands, each four times, from $5 on.
    """
    lines = [
        *_lookups("u", words and words[:2], 5),
        *_lookups("d", words and words[2:], 13),
        *(f"lop3.b32 u{i}, s{i}, 0x80808080, u{i}, {_OR_MASKED:#x}" for i in (0, 1)),
        *(f"prmt.b32 ${2 * i + j}, d{i}, u{i}, {_ZIP[j]}" for i in (0, 1) for j in (0, 1)),
    ]
    return _block("u d", lines, source="$4")


def float16_words(fmt: FloatFormat, dtype: torch.dtype) -> Words:
    """The upper bytes of the values of the magnitude codes, and the lower ones."""
    values = torch.tensor(fmt.integer_values[:HALF]).to(dtype).view(torch.int16).tolist()
    return *_words([value >> 8 for value in values]), *_words(values)


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


def _lookups(name: str, words: Sequence[int] | None, operand: int = 0) -> list[str]:
    """``{name}0``, ``{name}1``: bytes that c0 and c1 select in two words of eight bytes.

    Without ``words`` they are the operands ``operand`` and, four later, the next one.
    """
    if words is None:
        lines, table = [], f"${operand}, ${operand + 4}"
    else:
        lines = [f"or.b32 {name}t, z, {words[0] & 0xFFFFFFFF:#010x}"]
        table = f"{name}t, {words[1] & 0xFFFFFFFF:#010x}"
    return lines + [f"prmt.b32 {name}{i}, {table}, c{i}" for i in (0, 1)]


def _words(values: Sequence[int]) -> tuple[int, int]:
    """Eight bytes as two int32."""
    low, high = struct.unpack("<2i", bytes(value & 255 for value in values))
    return low, high
