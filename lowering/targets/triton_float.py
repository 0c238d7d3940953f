"""16-bit tensor cores: activations in 16 or 32 bits, or of formats beyond int8; float32 sums.

Many rows multiply weights that a kernel before has decoded: to decode a tile again for every 128
rows took longer than the products.
"""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.lowering.problem import FLOAT, GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    FEW_ROWS,
    HOPPER,
    MANY_COLUMNS,
    Tile,
    TritonTarget,
    block_rows,
    capability,
    declines_architecture,
    float_type,
)
from fp4compile.lowering.unpack import float16_ptx, float16_words, table

# Up to here decoding all of the weight would take longer than the products.
MOST_ROWS = 64


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != FLOAT:
        return "an int8 operand is for exact sums"
    if problem.block_size:
        return "block scales need a factor per block"
    return declines_architecture(problem)


def common_parameters(problem: GemmProblem) -> dict[str, Any]:
    """All integer values of 4 bits are exact in both 16-bit types; float32 is three bfloat16."""
    return {
        "VALUE_TYPE": str(float_type(problem)).replace("torch", "tl"),
        "SUM_TYPE": "tl.float32",
        "PARTS": 3 if problem.operand_dtype == torch.float32 else 1,
    }


def _few_rows_parameters(problem: GemmProblem) -> dict[str, Any]:
    words = float16_words(problem.format, float_type(problem))
    return common_parameters(problem) | {
        "PTX": float16_ptx(words),
        "CONSTRAINTS": "=r,=r,=r,=r,r",
        "TABLE": table(problem.format),
    }


def tile(problem: GemmProblem, rows: int) -> Tile:
    """For decoded weights."""
    if problem.operand_dtype == torch.float32:
        return Tile(64, 64, 64, num_warps=4, num_stages=3)
    # AMD's GPUs have a quarter of the shared memory.
    stages = 4 if capability(problem) else 2
    if rows <= 512:
        return Tile(64, 128, 64, num_warps=4, num_stages=stages)
    if capability(problem) == HOPPER:
        return Tile(128, 256, 64, num_warps=8, num_stages=4)
    return Tile(128, 128, 64, num_warps=8, num_stages=stages)


def _few_rows_tile(problem: GemmProblem, rows: int) -> Tile:
    if problem.operand_dtype == torch.float32:
        return Tile(16, 16, 128, num_warps=4, num_stages=3, slices=4)
    block_m = block_rows(problem, rows)
    if capability(problem) == HOPPER and (block_m > FEW_ROWS or problem.N >= MANY_COLUMNS):
        block_n = 32 if problem.N >= MANY_COLUMNS else 16
        return Tile(block_m, block_n, 128, num_warps=2, num_stages=4, slices=2)
    if block_m > FEW_ROWS:
        return Tile(block_m, 32, 64, num_warps=4, num_stages=2)
    return Tile(block_m, 16, 128, num_warps=4, num_stages=4, slices=4)


FEW = TritonTarget(
    "triton_float",
    "triton_few",
    _declines,
    _few_rows_parameters,
    _few_rows_tile,
    most_rows=MOST_ROWS,
)
TARGET = TritonTarget(
    "triton_float",
    "triton_decoded",
    _declines,
    common_parameters,
    tile,
    few_rows=FEW,
    decoded=True,
)
