"""fp8 tensor cores: activations of E4M3 or E5M2, E2M1 and E1M2 weights, float32 sums.

Few rows are bfloat16 products: sm_90 multiplies 8-bit floats 64 rows at a time only.
"""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.formats import by_name
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import triton_float
from fp4compile.lowering.targets.triton_gemm import Tile, TritonTarget, capability
from fp4compile.lowering.unpack import float8_ptx, table

FIRST_CAPABILITY = 89
# Hopper keeps about 14 bits of an fp8 sum: after so many products it is added to a float32.
IMPRECISE = 64
# operand format -> (Triton's type, torch's) of NVIDIA and gfx950, and of gfx942 (bias one more).
OCP = {
    "e4m3": ("tl.float8e4nv", torch.float8_e4m3fn),
    "e5m2": ("tl.float8e5", torch.float8_e5m2),
}
FNUZ = {
    "e4m3": ("tl.float8e4b8", torch.float8_e4m3fnuz),
    "e5m2": ("tl.float8e5b16", torch.float8_e5m2fnuz),
}


def _declines(problem: GemmProblem) -> str | None:
    if problem.operand_format not in OCP:
        return f"an operand of {problem.operand_format or 'unknown values'} is not of e4m3 or e5m2"
    if problem.shift_block:
        return "an operand times powers of two leaves the range of 8 bits"
    if problem.block_size:
        return "block scales need a sum per block"
    if not exact(problem.format.integer_values, _types(problem)[1]):
        return f"{problem.weight_format} has values that are none of {problem.operand_format}"
    if capability(problem) < FIRST_CAPABILITY and problem.architecture not in ("gfx942", "gfx950"):
        return f"{problem.architecture} has no fp8 tensor cores"
    return None


def exact(values: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether all of ``values`` are values of ``dtype``."""
    wanted = torch.tensor(values, dtype=torch.float32)
    return torch.equal(wanted.to(dtype).to(torch.float32), wanted)


def _types(problem: GemmProblem) -> tuple[str, torch.dtype]:
    return (FNUZ if problem.architecture == "gfx942" else OCP)[problem.operand_format]


def operand_factor(problem: GemmProblem) -> float:
    """From the integer values of the operand's format to values of the 8-bit type.

    The OCP types are the formats themselves. Those of gfx942 have half the step and less than twice
    the range, so that the halves of all values are in them.
    """
    step = by_name(problem.operand_format).default_step
    return step / 2 if problem.architecture == "gfx942" else step


def _operand(problem: GemmProblem) -> tuple[torch.dtype, float]:
    return _types(problem)[1], operand_factor(problem)


def _parameters(problem: GemmProblem) -> dict[str, Any]:
    name, dtype = _types(problem)
    return {
        "PTX": float8_ptx(problem.format, dtype),
        "CONSTRAINTS": "=r,=r,r",
        "TABLE": table(problem.format),
        "VALUE_TYPE": name,
        "SUM_TYPE": "tl.float32",
        "UNIT": 1 / operand_factor(problem),
        "DOT_OPTIONS": f", max_num_imprecise_acc={IMPRECISE}",
    }


def _tile(problem: GemmProblem, rows: int) -> Tile:
    return Tile(128, 128, 128 if capability(problem) else 64, num_warps=8, num_stages=3)


TARGET = TritonTarget(
    "triton_float8",
    "triton_gemm",
    _declines,
    _parameters,
    _tile,
    few_rows=triton_float.FEW,
    operand=_operand,
)
