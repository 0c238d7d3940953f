"""int8 tensor cores: codes become their integer values, sums are exact in int32."""

from __future__ import annotations

from typing import Any

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    Tile,
    TritonTarget,
    declines_architecture,
    splits,
)
from fp4compile.lowering.unpack import int8_ptx, int8_words, table


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != INT8:
        return f"a {problem.operand_dtype} operand needs float sums"
    if problem.block_size:
        return "block scales need a sum per block"
    return declines_architecture(problem)


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    return {
        "PTX": int8_ptx(int8_words(problem.format)),
        "CONSTRAINTS": "=r,=r,r",
        "TABLE": table(problem.format),
        "VALUE_TYPE": "tl.int8",
        "SUM_TYPE": "tl.int32",
        "PARTS": 1,
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    if rows <= 16:
        split = splits(problem, 32, 256)
        return Tile(16, 32, 256, num_warps=4, num_stages=4, split_k=split)
    if rows <= 64:
        return Tile(64, 64, 128, num_warps=4, num_stages=4)
    return Tile(128, 128, 128, num_warps=8, num_stages=3)


TARGET = TritonTarget("triton_int8", "triton_gemm", _declines, _parameters, _tile)
