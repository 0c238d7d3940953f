"""16-bit tensor cores: activations in 16 or 32 bits, or of formats beyond int8; float32 sums."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.lowering.problem import FLOAT, GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    Tile,
    TritonTarget,
    declines_architecture,
    splits,
)
from fp4compile.lowering.unpack import float16_ptx, float16_words, table


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != FLOAT:
        return "an int8 operand is for exact sums"
    if problem.block_size:
        return "block scales need a sum per block"
    return declines_architecture(problem)


def float_parameters(problem: GemmProblem) -> dict[str, Any]:
    """All integer values of 4 bits are exact in both 16-bit types; float32 is three bfloat16."""
    half = problem.operand_dtype == torch.float16
    words = float16_words(problem.format, torch.float16 if half else torch.bfloat16)
    return {
        "PTX": float16_ptx(words),
        "CONSTRAINTS": "=r,=r,=r,=r,r",
        "TABLE": table(problem.format),
        "VALUE_TYPE": "tl.float16" if half else "tl.bfloat16",
        "SUM_TYPE": "tl.float32",
        "PARTS": 3 if problem.operand_dtype == torch.float32 else 1,
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    wide = problem.operand_dtype == torch.float32
    if rows <= 16:
        split = splits(problem, 32, 128)
        return Tile(16, 32, 128, num_warps=4, num_stages=3 if wide else 4, split_k=split)
    if rows <= 64 or wide:
        return Tile(64, 64, 64, num_warps=4, num_stages=3 if wide else 4)
    return Tile(128, 128, 64, num_warps=8, num_stages=3)


TARGET = TritonTarget("triton_float", "triton_gemm", _declines, float_parameters, _tile)
