"""AVX512: vpdpbusd for the exact int8 route, vdpbf16ps for the float route."""

from __future__ import annotations

from fp4compile.lowering.problem import FLOAT, INT8
from fp4compile.lowering.targets.template import CppTarget, missing_flags

_TEMPLATES = {INT8: ("avx512", "avx512_int8"), FLOAT: ("avx512", "avx512_bf16")}
_BASE = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_FLAGS = {INT8: (*_BASE, "avx512_vnni"), FLOAT: (*_BASE, "avx512_bf16")}

TARGET = CppTarget(
    name="cpp_avx512",
    templates=lambda problem: _TEMPLATES[problem.route],
    declines=lambda problem: missing_flags(_FLAGS[problem.route]),
)
