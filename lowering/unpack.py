"""Packed FP4 codes to numbers in a Triton kernel: texts of two forms of one function.

``*_ptx``: NVIDIA assembly for ``tl.inline_asm_elementwise``, mostly with ``pack=4``: a register of
four bytes, eight codes, to registers with their values in the same order. A permutation of bytes
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

NEGATIVE_ZEROS = 0x80008000

# lop3 tables: f(0xF0, 0xCC, 0xAA) for operands a, b, c.
_SELECT = 0xF0 & 0xCC | ~0xF0 & 0xAA & 0xFF  # a ? b : c
_OR_MASKED = 0xF0 & 0xCC | 0xAA  # (a & b) | c


# The two tables that a look-up takes, each as the two words of its eight bytes.
Words = tuple[int, int, int, int]


def int8_ptx(fmt: FloatFormat) -> str:
    """$2 four bytes; $0, $1 int8 values of the codes. 11 instructions in a loop."""
    words = int8_words(fmt)
    lines = [
        *_lookups("p", words[:2]),
        *_lookups("n", words[2:]),
        *(f"lop3.b32 ${i}, s{i}, n{i}, p{i}, {_SELECT:#x}" for i in (0, 1)),
    ]
    return _block("p n", lines, source="$2")


def float8_ptx(fmt: FloatFormat, dtype: torch.dtype) -> str:
    """As :func:`int8_ptx`, to an 8-bit float type that has a sign bit and zeros. 9 instructions."""
    values = torch.tensor(fmt.integer_values[:HALF], dtype=torch.float32)
    magnitudes = values.to(dtype).view(torch.uint8).tolist()
    lines = [
        *_lookups("p", _words(magnitudes)),
        *(f"lop3.b32 ${i}, s{i}, 0x80808080, p{i}, {_OR_MASKED:#x}" for i in (0, 1)),
    ]
    return _block("p", lines, source="$2")


def int8_products_ptx(words: Words | None) -> str:
    """$0 is the int32 $4 plus the products of the eight codes of $1 and the eight int8 of $2, $3.

    13 instructions in a loop. ``words``: of :func:`int8_words`; None: operands from $5 on.
    """
    lines = [
        *_lookups("p", words and words[:2], ("$5", "$6")),
        *_lookups("n", words and words[2:], ("$7", "$8")),
        *(f"lop3.b32 p{i}, s{i}, n{i}, p{i}, {_SELECT:#x}" for i in (0, 1)),
        "dp4a.s32.s32 l, p0, $2, $4",
        "dp4a.s32.s32 $0, p1, $3, l",
    ]
    return _block("p n", lines, source="$1")


def int8_words(fmt: FloatFormat) -> Words:
    """The values of the magnitude codes, and the same negated."""
    positive = fmt.integer_values[:HALF]
    return *_words(positive), *_words([-value for value in positive])


def float16_ptx(words: Words, factor: str = "") -> str:
    """$4 four bytes; $0 to $3 values of the codes in a 16-bit float.

    A float is looked up as two bytes; the sign goes into the upper one. 15 instructions in a loop.
    ``words``: of :func:`float16_words`. ``factor``: "bf16" or "f16": $5 to $8 are factors of the
    bytes' values, each twice in a register of that type; 4 instructions more.
    """
    lines = [
        *_lookups("u", words[:2]),
        *_lookups("d", words[2:]),
        *(f"lop3.b32 u{i}, s{i}, 0x80808080, u{i}, {_OR_MASKED:#x}" for i in (0, 1)),
        *(f"prmt.b32 ${2 * i + j}, d{i}, u{i}, {_ZIP[j]}" for i in (0, 1) for j in (0, 1)),
        *(_products(factor, 5) if factor else []),
    ]
    return _block("u d", lines, source="$4")


def float16_tables_ptx(factor: str) -> str:
    """As :func:`float16_ptx`, where every byte may have tables of its own: $5 to $20 are the words,
    each for the four bytes, $21 to $24 the factors. A thread's four bytes need not be of one row.
    """
    lines = []
    for i in range(4):
        u, d = (", ".join(f"${5 + 4 * word + i}" for word in pair) for pair in ((0, 1), (2, 3)))
        lines += [
            f"shr.u32 c1, c0, {8 * i}",
            f"prmt.b32 u0, {u}, c1",
            f"prmt.b32 d0, {d}, c1",
            f"prmt.b32 s0, l, $4, {(12 + i) << 4 | 8 + i:#x}",
            f"lop3.b32 u0, s0, 0x80808080, u0, {_OR_MASKED:#x}",
            f"prmt.b32 ${i}, d0, u0, {_ZIP[0]}",
        ]
    return _block("u d", [*lines, *_products(factor, 21)], source="$4")


def _products(factor: str, first: int) -> list[str]:
    """$0 to $3 times the operands from ``first`` on."""
    # -0.0 changes no product; mul.bf16x2 begins with sm_90.
    zeros = f"mov.b32 l, {NEGATIVE_ZEROS:#x}"
    return [zeros, *(f"fma.rn.{factor}x2 ${i}, ${i}, ${first + i}, l" for i in range(4))]


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


def _lookups(
    name: str, words: Sequence[int] | None, operands: tuple[str, str] = ("", "")
) -> list[str]:
    """``{name}0``, ``{name}1``: bytes that c0 and c1 select in two words of eight bytes, which are
    ``operands`` without ``words``.
    """
    if words is None:
        lines, table = [], ", ".join(operands)
    else:
        lines = [f"or.b32 {name}t, z, {words[0] & 0xFFFFFFFF:#010x}"]
        table = f"{name}t, {words[1] & 0xFFFFFFFF:#010x}"
    return lines + [f"prmt.b32 {name}{i}, {table}, c{i}" for i in (0, 1)]


def _words(values: Sequence[int]) -> tuple[int, int]:
    """Eight bytes as two int32."""
    low, high = struct.unpack("<2i", bytes(value & 255 for value in values))
    return low, high
