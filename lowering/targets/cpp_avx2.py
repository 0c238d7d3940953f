"""AVX2: int8 products for the exact int8 route, float32 ones for all else."""

from __future__ import annotations

from fp4compile.lowering.problem import INT8, GemmProblem
from fp4compile.lowering.targets.template import CppTarget, missing_flags

# A scale and a format are those of half a block of 32 codes.
HALF_BLOCK = 16
# Exponents of a code are those of a float16, but the largest, which means infinity there.
EXPONENTS = 31


def _templates(problem: GemmProblem) -> tuple[str, ...]:
    if problem.route != INT8 or problem.block_size:
        integers = problem.route == INT8 and problem.format.bits < 8
        whole = problem.block_size % (2 * HALF_BLOCK) == 0
        stream = "avx2_block_stream" if integers and whole else "avx2_float_stream"
        return ("avx2", "avx2_codes", "avx2_float", stream, "avx2_stream")
    products = "avx2_int16" if problem.format.bits == 8 else "avx2_int8"
    return ("avx2", "avx2_codes", products, "avx2_integers", "avx2_stream")


def _declines(problem: GemmProblem) -> str | None:
    if problem.block_size % HALF_BLOCK:
        return f"blocks of {problem.block_size} are not written, only multiples of {HALF_BLOCK}"
    for fmt in problem.formats:
        if (len(fmt.magnitudes) - 1) >> fmt.mantissa_bits >= EXPONENTS:
            return f"{fmt.name} has as many exponents as float16, which decodes it"
    return missing_flags(("avx2", "fma3", "f16c"))


TARGET = CppTarget(name="cpp_avx2", templates=_templates, declines=_declines)
