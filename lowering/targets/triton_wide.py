"""Weights of 6 and 8 bits: int8, fp8 or bfloat16 tensor cores, whichever holds both operands.

As fp8 the reserved codes of E4M3 and E5M2, which no quantizer makes, are NaN and infinity.
"""

from __future__ import annotations

from typing import Any

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_float8 import FIRST_CAPABILITY as FIRST_FP8
from fp4compile.lowering.targets.triton_float8 import IMPRECISE, OCP
from fp4compile.lowering.targets.triton_gemm import (
    Tile,
    TritonTarget,
    capability,
    declines_architecture,
    splits,
)


def _declines(problem: GemmProblem) -> str | None:
    if problem.block_size:
        return "block scales need a sum per block"
    return declines_architecture(problem)


def _is_fp8(problem: GemmProblem) -> bool:
    """Whether codes and operand are the same OCP type, in hardware that multiplies it."""
    present = capability(problem) >= FIRST_FP8 or problem.architecture == "gfx950"
    same = problem.weight_format == problem.operand_format and problem.weight_format in OCP
    return present and same and not problem.shift_block


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    fmt = problem.format
    common = {
        "BITS": fmt.bits,
        "MANTISSA_BITS": fmt.mantissa_bits,
        "LARGEST": float(fmt.max_integer),
        "RESERVED": fmt.reserved_codes > 0,
        "SUM_TYPE": "tl.float32",
        "PARTS": 1,
    }
    if _is_fp8(problem):
        step = fmt.default_step
        return common | {
            "DECODE": "bits",
            "VALUE_TYPE": OCP[problem.weight_format][0],
            "OPERAND_FACTOR": step,
            "UNIT": 1 / step**2,
            "DOT_OPTIONS": f", max_num_imprecise_acc={IMPRECISE}",
        }
    if problem.route == INT8 and fmt.fits_int8:
        return common | {"DECODE": "value", "VALUE_TYPE": "tl.int8", "SUM_TYPE": "tl.int32"}
    # All formats have at most 7 significant bits: exact in bfloat16, as is an int8.
    parts = 1 if problem.route == INT8 else problem.bfloat16_parts
    return common | {"DECODE": "value", "VALUE_TYPE": "tl.bfloat16", "PARTS": parts}


def _tile(problem: GemmProblem, rows: int) -> Tile:
    if rows <= 16:
        return Tile(16, 32, 64, num_warps=4, num_stages=3, split_k=splits(problem, 32, 64))
    return Tile(64, 64, 64, num_warps=4, num_stages=3)


TARGET = TritonTarget("triton_wide", "triton_wide", _declines, _parameters, _tile, bits=(6, 8))
