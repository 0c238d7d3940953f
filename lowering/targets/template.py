"""CppTarget: what the C++ targets share, from declining a problem to joining the kernel text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fp4compile.lowering.problem import INT8, GemmProblem

INT32_MAX = 2**31 - 1
TEMPLATES = Path(__file__).parents[1] / "templates"


@cache
def text(name: str) -> str:
    """The template called ``name``."""
    return (TEMPLATES / f"{name}.jinja").read_text()


@dataclass(frozen=True)
class CppTarget:
    """A C++ kernel family. ``templates`` names the kernel text between prelude and driver;
    ``declines`` gives the reason that is specific to the family.
    """

    name: str
    templates: Callable[[GemmProblem], tuple[str, ...]]
    declines: Callable[[GemmProblem], str | None]

    def supports(self, problem: GemmProblem) -> str | None:
        """None, or the reason for declining ``problem``."""
        return common_reason(problem) or self.declines(problem)

    def source(self, problem: GemmProblem) -> str:
        """Kernel text (jinja)."""
        driver = "grouped_driver" if problem.experts else "driver"
        return "\n".join(text(part) for part in ("prelude", *self.templates(problem), driver))


def common_reason(problem: GemmProblem) -> str | None:
    """Why none of the kernels computes ``problem``, or None."""
    if problem.device != "cpu":
        return f"the operand is on {problem.device}"
    if problem.route == INT8 and problem.largest_sum > INT32_MAX:
        return f"sums of K={problem.K} products do not fit int32"
    return None


def missing_flags(flags: tuple[str, ...]) -> str | None:
    """Why this CPU cannot run a kernel that needs ``flags``, or None."""
    present = torch.cpu.get_capabilities()
    missing = [flag for flag in flags if not present.get(flag)]
    return f"this CPU has no {', '.join(missing)}" if missing else None
