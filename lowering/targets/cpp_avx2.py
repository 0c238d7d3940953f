"""AVX2: vpmaddubsw, or vpdpbusd where AVX-VNNI is there, for the exact int8 route."""

from __future__ import annotations

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.template import CppTarget, missing_flags


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != INT8:
        return f"a {problem.operand_dtype} operand needs float sums; only int8 is written"
    if problem.block_size:
        return "block scales need a sum per block, which is not written"
    return missing_flags(("avx2",))


TARGET = CppTarget(name="cpp_avx2", templates=lambda problem: ("avx2_int8",), declines=_declines)
