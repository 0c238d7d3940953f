"""One row of int8: dp4a on CUDA cores, as weights lie in memory. Sums are exact in int32, with
block scales those of each block.
"""

from __future__ import annotations

from typing import Any

from fp4compile.lowering.config import config
from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    MANY_COLUMNS,
    Tile,
    TritonTarget,
    capability,
)
from fp4compile.lowering.unpack import int8_products_ptx, int8_words

WORD_CODES = 8


def _declines(problem: GemmProblem) -> str | None:
    if not config.gpu_assembly or not capability(problem):
        return "dp4a is NVIDIA's assembly"
    if problem.route != INT8:
        return "the operand is not int8"
    if problem.experts:
        return "experts have rows of their own"
    if problem.K % (problem.block_size or WORD_CODES):
        return f"K={problem.K} is no whole number of {problem.block_size or WORD_CODES} codes"
    return None


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    first, *second = problem.formats
    words = int8_words(first)
    tables = ["table0", "table1", "table2", "table3"] if second else []
    return {
        "WORDS_PER_ROW": problem.K // WORD_CODES,
        "WORDS_PER_BLOCK": problem.block_size // WORD_CODES,
        "PTX": int8_products_ptx(None if second else words),
        "CONSTRAINTS": ",".join(["=r", *(4 + len(tables)) * ["r"]]),
        "WORDS": "".join(f", {name}" for name in tables),
        "FIRST_WORDS": words,
        "SECOND_WORDS": int8_words(second[0]) if second else (),
        "VALUE_TYPE": "tl.int8",
        "SUM_TYPE": "tl.int32",
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    if problem.N >= MANY_COLUMNS:
        block_n, words = (16, 128) if problem.block_size else (8, 64)
        return Tile(1, block_n, words, num_warps=8, num_stages=1)
    return Tile(1, 8, 128, num_warps=8, num_stages=1)


def one_row(name: str) -> TritonTarget:
    """The family for a single row of the one called ``name``."""
    return TritonTarget(name, "triton_row", _declines, _parameters, _tile, most_rows=1)
