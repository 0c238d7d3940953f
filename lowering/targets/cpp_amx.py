"""AMX: tdpbsud for the exact int8 route, tdpbf16ps for the float route; few rows run on AVX512."""

from __future__ import annotations

import torch

from fp4compile.lowering.problem import FLOAT, INT8, GemmProblem
from fp4compile.lowering.targets import cpp_avx512
from fp4compile.lowering.targets.template import CppTarget, missing_flags

_FLAGS = {INT8: ("amx_tile", "amx_int8"), FLOAT: ("amx_tile", "amx_bf16")}


def _templates(problem: GemmProblem) -> tuple[str, ...]:
    family = cpp_avx512.FAMILIES[problem.route]
    return ("avx512", f"{family}_operand", family, "amx_tiles", "amx_panel")


def without_tiles(problem: GemmProblem) -> str | None:
    """Why this process cannot use the tiles that ``problem`` needs, or None."""
    reason = missing_flags(_FLAGS[problem.route])
    if reason is None and not torch.cpu._init_amx():
        return "the system does not let this process use AMX tiles"
    return reason


def _declines(problem: GemmProblem) -> str | None:
    if problem.block_size:
        return "block scales are not written"
    return missing_flags(cpp_avx512.FLAGS[problem.route]) or without_tiles(problem)


TARGET = CppTarget(name="cpp_amx", templates=_templates, declines=_declines)
