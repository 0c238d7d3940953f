"""What a user may ask of the CPU lowerings; read once per compiled problem."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

CPU_TARGET_VARIABLE = "FP4COMPILE_CPU_TARGET"


@dataclass
class LoweringConfig:
    """``cpu_target``: name of the only target to try, "reference" for the eager op, or None."""

    cpu_target: str | None = field(default_factory=lambda: os.environ.get(CPU_TARGET_VARIABLE))


config = LoweringConfig()
