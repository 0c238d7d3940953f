"""AVX2 for the exact int8 route: vpmaddubsw or vpmaddwd, or their sums where VNNI is there."""

from __future__ import annotations

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.template import CppTarget, missing_flags

VECTOR = 16


def _templates(problem: GemmProblem) -> tuple[str, ...]:
    narrow = problem.format.bits == 4 and not problem.block_size
    return ("avx2_int8" if narrow else "avx2_int16",)


def _declines(problem: GemmProblem) -> str | None:
    if problem.route != INT8:
        return (
            f"{problem.weight_format} weights and {problem.operand_dtype} operands need float "
            "sums; only int8 is written"
        )
    if problem.block_size % VECTOR:
        return f"blocks of {problem.block_size} are not written, only multiples of {VECTOR}"
    return missing_flags(("avx2",))


TARGET = CppTarget(name="cpp_avx2", templates=_templates, declines=_declines)
