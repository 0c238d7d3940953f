"""Tensor cores that multiply E2M1 themselves, with scales of blocks along K: mxf4 and mxf4nvf4.

The weight's bytes go to them as they are. The operand becomes E2M1 codes where its values are those
of E2M1, with the E4M3 scales of its blocks (NVFP4) or powers of two, one per block of 32 (E8M0: the
exponent shifts of LLM-FP4, where channels of one shift are neighbours). Any other operand becomes
an 8-bit float: half the rate, still no unpacking.
"""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.formats import by_name
from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.triton_float8 import OCP, exact
from fp4compile.lowering.targets.triton_gemm import Tile, TritonTarget, architecture_number, splits

FIRST_CAPABILITY = 100
AMD = "gfx950"
# Whose instructions take an 8-bit float and E2M1; elsewhere Triton widens both to bfloat16.
MIXED = ("sm_100", "sm_103", AMD)
# tcgen05, of which one operand has 128 rows.
WIDE = ("sm_100", "sm_103")
E2M1 = "e2m1"
# Values that share an E4M3 and an E8M0 scale in hardware.
NVFP4_BLOCK, MX_BLOCK = 16, 32


def multiplies_fp4(architecture: str) -> bool:
    """Whether GPUs of ``architecture`` (``"sm_120"``) have tensor cores for 4-bit floats."""
    return architecture_number(architecture) >= FIRST_CAPABILITY or architecture == AMD


def _declines(problem: GemmProblem) -> str | None:
    if not multiplies_fp4(problem.architecture):
        return f"{problem.architecture} does not multiply 4-bit floats"
    if problem.weight_format != E2M1:
        return f"{problem.weight_format} is not e2m1, the 4-bit format of the hardware"
    if problem.experts:
        return "a stack of experts has tiles of its own"
    if problem.block_size:
        return _declines_blocks(problem)
    if _is_fp4(problem):
        return None
    if problem.architecture not in MIXED:
        return (
            f"the operand is not e2m1, and {problem.architecture} multiplies it with nothing else"
        )
    return _declines_mixed(problem)


def _declines_blocks(problem: GemmProblem) -> str | None:
    if problem.operand_format != E2M1 or problem.shift_block:
        return "an operand that is not e2m1 has no block scales in hardware"
    if problem.architecture == AMD:
        return f"{AMD} has no E4M3 scales"
    if problem.block_size % NVFP4_BLOCK:
        return f"blocks of {problem.block_size} are no multiple of {NVFP4_BLOCK}"
    return None


def _declines_mixed(problem: GemmProblem) -> str | None:
    if problem.operand_format in OCP and not problem.shift_block:
        return None
    if not problem.operand_format or problem.route != INT8:
        return "the operand's values are in no 8-bit float"
    fmt = by_name(problem.operand_format)
    largest = fmt.max_shift if problem.shift_block else 0
    values = tuple(value << largest for value in fmt.integer_values)
    if not exact(fmt.integer_values + values, torch.float8_e4m3fn):
        return f"values of {problem.operand_format} are not those of e4m3"
    return None


def _is_fp4(problem: GemmProblem) -> bool:
    """Whether the operand is codes of E2M1 times the scales of its blocks."""
    return problem.operand_format == E2M1 and (
        problem.shift_block == 0 or problem.shift_block % MX_BLOCK == 0
    )


def _reads(problem: GemmProblem) -> tuple[str, ...]:
    if problem.operand_scale == "block":
        return ("operand_outer",)
    return ("operand_shift",) if _is_fp4(problem) and problem.shift_block else ()


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    fmt = by_name(problem.operand_format)
    weight_unit = by_name(E2M1).default_step
    if _is_fp4(problem):
        operand, factor = E2M1, fmt.default_step
    elif problem.operand_format in OCP:
        operand, factor = problem.operand_format, fmt.default_step
    else:
        operand, factor = "e4m3", 1.0
    return {
        "OPERAND": operand,
        "OPERAND_TYPE": "tl.uint8" if operand == E2M1 else OCP[operand][0],
        "CODES": _codes_by_value(),
        "OPERAND_FACTOR": factor,
        "UNIT": 1 / (factor * weight_unit),
        "SCALE_BLOCK": NVFP4_BLOCK if problem.block_size else MX_BLOCK,
        "BLOCK_SIZE": problem.block_size,
        "SHIFTS": "operand_shift" in _reads(problem),
        "WIDE": problem.architecture in WIDE,
        "SUM_TYPE": "tl.float32",
        "VALUE_TYPE": "tl.int8",  # of the macro that unpacks, unused here
    }


def _codes_by_value() -> int:
    """Nibble ``v`` is the E2M1 code of the integer value ``v``, up to 12."""
    return sum(code << 4 * value for code, value in enumerate(by_name(E2M1).magnitudes))


def _tile(problem: GemmProblem, rows: int) -> Tile:
    columns = 128 if problem.architecture in WIDE else 64
    if rows <= 16:
        split = 1 if problem.block_size else splits(problem, columns, 256)
        return Tile(16, columns, 256, num_warps=4, num_stages=3, split_k=split)
    if rows <= 64:
        # 256 along K spills registers on sm_120.
        return Tile(64, columns, 128, num_warps=4, num_stages=3)
    return Tile(128, 128, 128, num_warps=8, num_stages=3)


TARGET = TritonTarget("triton_scaled", "triton_scaled", _declines, _parameters, _tile, _reads)
