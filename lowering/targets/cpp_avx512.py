"""AVX512: vpdpbusd for the exact int8 route, vdpbf16ps for the float route."""

from __future__ import annotations

from fp4compile.lowering.problem import FLOAT, INT8, GemmProblem
from fp4compile.lowering.targets.template import CppTarget, missing_flags

_BASE = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
FLAGS = {INT8: (*_BASE, "avx512_vnni"), FLOAT: (*_BASE, "avx512_bf16")}
FAMILIES = {INT8: "avx512_int8", FLOAT: "avx512_bf16"}
# A vector of packed bytes holds whole blocks, and a sum's lane of 8 codes lies within one.
BLOCK_SIZES = (16, 32, 64, 128)


def _templates(problem: GemmProblem) -> tuple[str, ...]:
    family = FAMILIES[problem.route]
    if problem.block_size:
        return ("avx512", "avx512_blocks", f"{family}_operand", f"{family}_blocks")
    return ("avx512", f"{family}_operand", family, f"{family}_panel")


def _declines(problem: GemmProblem) -> str | None:
    if problem.block_size and problem.format.bits != 4:
        return f"block scales of {problem.format.bits}-bit codes are not written"
    if problem.block_size and problem.block_size not in BLOCK_SIZES:
        return f"blocks of {problem.block_size} are not written, only {BLOCK_SIZES}"
    return missing_flags(FLAGS[problem.route])


TARGET = CppTarget(name="cpp_avx512", templates=_templates, declines=_declines)
