"""Targets of each kind of device, best first; the first that supports a problem computes it."""

from collections.abc import Sequence

from fp4compile.lowering.targets import (
    cpp_amx,
    cpp_avx2,
    cpp_avx512,
    cpp_neon,
    cpp_portable,
    triton_blocks,
    triton_float,
    triton_float8,
    triton_int8,
    triton_scaled,
    triton_wide,
)
from fp4compile.lowering.targets.template import CppTarget
from fp4compile.lowering.targets.triton_gemm import TritonTarget

CPU_TARGETS: tuple[CppTarget, ...] = (
    cpp_amx.TARGET,
    cpp_avx512.TARGET,
    cpp_avx2.TARGET,
    cpp_neon.TARGET,
    cpp_portable.TARGET,
)
GPU_TARGETS: tuple[TritonTarget, ...] = (
    triton_scaled.TARGET,
    triton_float8.TARGET,
    triton_int8.TARGET,
    triton_float.TARGET,
    triton_blocks.TARGET,
    triton_wide.TARGET,
)


def targets_of(device: str) -> Sequence[CppTarget] | Sequence[TritonTarget]:
    """Targets of a type of device; the CPU's, which will decline, where none is written."""
    return GPU_TARGETS if device == "cuda" else CPU_TARGETS


__all__ = ["CPU_TARGETS", "GPU_TARGETS", "CppTarget", "TritonTarget", "targets_of"]
