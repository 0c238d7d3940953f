"""What a user may ask of the lowerings; read once per compiled problem."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

CPU_TARGET_VARIABLE = "FP4COMPILE_CPU_TARGET"
GPU_TARGET_VARIABLE = "FP4COMPILE_GPU_TARGET"


@dataclass
class LoweringConfig:
    """``cpu_target``, ``gpu_target``: name of the only target to try, "reference" for the eager op,
    or None. ``gpu_assembly``: NVIDIA kernels unpack by inline PTX, not by arithmetic.
    """

    cpu_target: str | None = field(default_factory=lambda: os.environ.get(CPU_TARGET_VARIABLE))
    gpu_target: str | None = field(default_factory=lambda: os.environ.get(GPU_TARGET_VARIABLE))
    gpu_assembly: bool = True

    def setting(self, device: str) -> str:
        """Name of the field that forces a target on a type of device."""
        return "gpu_target" if device == "cuda" else "cpu_target"


config = LoweringConfig()
