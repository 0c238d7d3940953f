"""CPU targets, best first; the first that supports a problem computes it."""

from fp4compile.lowering.targets import cpp_avx2, cpp_avx512, cpp_portable
from fp4compile.lowering.targets.template import CppTarget

CPU_TARGETS: tuple[CppTarget, ...] = (
    cpp_avx512.TARGET,
    cpp_avx2.TARGET,
    cpp_portable.TARGET,
)

__all__ = ["CPU_TARGETS", "CppTarget"]
