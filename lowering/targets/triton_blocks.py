"""Block scales: a sum per block, int8 where the operand is and 32 codes fill an instruction."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.formats import FloatFormat
from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_gemm import Tile, TritonTarget, declines_architecture
from fp4compile.lowering.unpack import (
    Words,
    float16_ptx,
    float16_words,
    int8_ptx,
    int8_words,
    table,
)

BLOCK_SIZES = (16, 32, 64, 128)
# Products of int8 are summed 32 at a time.
INT8_BLOCK = 32


def _declines(problem: GemmProblem) -> str | None:
    if not problem.block_size:
        return "it sums block by block, and the weight has a scale per channel"
    if problem.block_size not in BLOCK_SIZES:
        return f"blocks of {problem.block_size} are not written, only {BLOCK_SIZES}"
    return declines_architecture(problem)


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    first, *second = problem.formats
    integers = problem.route == INT8 and problem.block_size >= INT8_BLOCK
    half = problem.operand_dtype == torch.float16
    float_type = torch.float16 if half else torch.bfloat16

    def words(fmt: FloatFormat) -> Words:
        return int8_words(fmt) if integers else float16_words(fmt, float_type)

    ptx = int8_ptx if integers else float16_ptx
    registers = 2 if integers else 4
    parameters = {
        "VALUE_TYPE": "tl.int8" if integers else "tl.float16" if half else "tl.bfloat16",
        "SUM_TYPE": "tl.int32" if integers else "tl.float32",
        # An int8 is exact in one bfloat16.
        "WIDEN": problem.route == INT8 and not integers,
        "PARTS": 3 if problem.operand_dtype == torch.float32 else 1,
        "SECOND_TABLE": 0,
    }
    if not second:
        return parameters | {
            "PTX": ptx(words(first)),
            "CONSTRAINTS": ",".join(registers * ["=r"] + ["r"]),
            "TABLE": table(first),
        }
    return parameters | {
        "PTX": ptx(None),
        # Four elements of a byte each are one register, four of a word four.
        "CONSTRAINTS": ",".join(registers * ["=r"] + ["r"] + 16 * ["r"]),
        "WORDS": ", word0, word1, word2, word3",
        "TABLE": "table",
        "FIRST_WORDS": words(first),
        "SECOND_WORDS": words(second[0]),
        "FIRST_TABLE": table(first),
        "SECOND_TABLE": table(second[0]),
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    if rows <= 16:
        return Tile(16, 64, problem.block_size, num_warps=4, num_stages=4)
    if rows <= 64 or problem.operand_dtype == torch.float32:
        return Tile(64, 64, problem.block_size, num_warps=4, num_stages=3)
    return Tile(128, 128, problem.block_size, num_warps=8, num_stages=3)


TARGET = TritonTarget("triton_blocks", "triton_blocks", _declines, _parameters, _tile)
