"""NEON on 64-bit ARM for the int8 route: the dot product of signed bytes, or products and sums."""

from __future__ import annotations

import platform

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.template import CppTarget

# Codes that are decoded at a time.
CODES = 32


def without_neon() -> str | None:
    """Why this machine has no NEON of 64 bits, or None."""
    machine = platform.machine()
    return None if machine in ("aarch64", "arm64") else f"this is {machine}, not 64-bit ARM"


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != INT8:
        return (
            f"{problem.weight_format} weights and {problem.operand_dtype} operands need float "
            "sums; only int8 is written"
        )
    if problem.block_size % CODES:
        return f"blocks of {problem.block_size} are not written, only multiples of {CODES}"
    return without_neon()


TARGET = CppTarget(name="cpp_neon", templates=lambda problem: ("neon",), declines=_declines)
