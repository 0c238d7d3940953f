"""Block scales: 16-bit tensor cores, codes times the scale of their block.

A code has at most 3 significant bits and an E4M3 scale 4, so their product is exact in 16 bits: no
block needs a sum of its own. So is that of an operand's code of at most 4 bits with its scale;
others are float32, as three bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.formats import alternatives
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets.triton_float import MOST_ROWS, common_parameters, tile
from fp4compile.lowering.targets.triton_gemm import (
    Tile,
    TritonTarget,
    block_rows,
    declines_architecture,
    float_type,
)
from fp4compile.lowering.targets.triton_row import one_row
from fp4compile.lowering.unpack import float16_ptx, float16_tables_ptx, float16_words, table

BLOCK_SIZES = (16, 32, 64, 128)
# Significant ones.
E4M3_BITS, BFLOAT16_BITS = 4, 8


def _declines(problem: GemmProblem) -> str | None:
    if not problem.block_size:
        return "the weight has a scale per channel"
    if problem.block_size not in BLOCK_SIZES:
        return f"blocks of {problem.block_size} are not written, only {BLOCK_SIZES}"
    return declines_architecture(problem)


def _operand(problem: GemmProblem) -> tuple[torch.dtype, float] | None:
    if problem.operand_scale == "block":
        return torch.bfloat16 if _exact_with_scale(problem.operand_format) else torch.float32, 1.0
    return (torch.bfloat16, 1.0) if problem.operand_dtype == torch.int8 else None


def _exact_with_scale(operand_format: str) -> bool:
    """Whether a code's value times an E4M3 scale is a bfloat16."""
    if not operand_format:
        return False
    bits = max(fmt.mantissa_bits + 1 for fmt in alternatives(operand_format))
    return bits + E4M3_BITS <= BFLOAT16_BITS


def _reads(problem: GemmProblem) -> tuple[str, ...]:
    return ("operand_outer",) if problem.operand_scale == "block" else ()


def _few_rows_parameters(problem: GemmProblem) -> dict[str, Any]:
    first, *second = problem.formats
    dtype = float_type(problem)
    # Of four elements, those of a byte are one register, those of a word four.
    registers = [*4 * ["=r"], "r", *4 * ["r"]]
    parameters = common_parameters(problem)
    name = "f16" if dtype == torch.float16 else "bf16"
    words = float16_words(first, dtype)
    if not second:
        return parameters | {
            "PTX": float16_ptx(words, factor=name),
            "CONSTRAINTS": ",".join(registers),
            "TABLE": table(first),
        }
    return parameters | {
        "PTX": float16_tables_ptx(name),
        "CONSTRAINTS": ",".join([*registers, *16 * ["r"]]),
        "WORDS": ", word0, word1, word2, word3",
        "TABLE": "table",
        "FIRST_WORDS": words,
        "SECOND_WORDS": float16_words(second[0], dtype),
        "FIRST_TABLE": table(first),
        "SECOND_TABLE": table(second[0]),
    }


def _few_rows_tile(problem: GemmProblem, rows: int) -> Tile:
    slices = max(1, 128 // problem.block_size)
    return Tile(block_rows(problem, rows), 16, problem.block_size, 4, 3, slices=slices)


TARGET = TritonTarget(
    "triton_blocks",
    "triton_decoded",
    _declines,
    common_parameters,
    tile,
    reads=_reads,
    operand=_operand,
    decoded=True,
    few_rows=TritonTarget(
        "triton_blocks",
        "triton_few",
        _declines,
        _few_rows_parameters,
        _few_rows_tile,
        reads=_reads,
        operand=_operand,
        most_rows=MOST_ROWS,
        few_rows=one_row("triton_blocks"),
    ),
)
