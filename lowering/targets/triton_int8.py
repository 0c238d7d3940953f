"""int8 tensor cores: codes become their integer values, sums are exact in int32."""

from __future__ import annotations

from typing import Any

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    FEW_ROWS,
    HOPPER,
    MANY_COLUMNS,
    Tile,
    TritonTarget,
    block_rows,
    capability,
    declines_architecture,
)
from fp4compile.lowering.targets.triton_row import one_row
from fp4compile.lowering.unpack import int8_ptx, table


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != INT8:
        return f"a {problem.operand_dtype} operand needs float sums"
    if problem.block_size:
        return "block scales need a sum per block"
    return declines_architecture(problem)


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    return {
        "PTX": int8_ptx(problem.format),
        "CONSTRAINTS": "=r,=r,r",
        "TABLE": table(problem.format),
        "VALUE_TYPE": "tl.int8",
        "SUM_TYPE": "tl.int32",
        "PARTS": 1,
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    if rows <= 64:
        return Tile(64, 64, 128, num_warps=4, num_stages=4)
    if rows <= 512:
        return Tile(128, 64, 128, num_warps=4, num_stages=4)
    if capability(problem) == HOPPER:
        return Tile(256, 64, 128, num_warps=4, num_stages=3)
    return Tile(128, 128, 128, num_warps=8, num_stages=3)


def _few_rows_tile(problem: GemmProblem, rows: int) -> Tile:
    if problem.N >= MANY_COLUMNS:
        return Tile(block_rows(problem, rows), 32, 128, num_warps=2, num_stages=4, slices=2)
    return Tile(block_rows(problem, rows), 16, 128, num_warps=4, num_stages=4, slices=4)


TARGET = TritonTarget(
    "triton_int8",
    "triton_gemm",
    _declines,
    _parameters,
    _tile,
    few_rows=TritonTarget(
        "triton_int8",
        "triton_few",
        _declines,
        _parameters,
        _few_rows_tile,
        few_rows=one_row("triton_int8"),
        most_rows=FEW_ROWS,
    ),
)
