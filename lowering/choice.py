"""Choosing a target for a problem, and saying what was chosen and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from fp4compile.errors import CompileError
from fp4compile.kernels import REFERENCE, KernelChoice
from fp4compile.lowering.config import config
from fp4compile.lowering.problem import GemmProblem

log = logging.getLogger("fp4compile.lowering")


class Target(Protocol):
    """A backend for GEMMs."""

    @property
    def name(self) -> str:
        """What ``config.cpu_target`` or ``config.gpu_target`` calls it."""

    def supports(self, problem: GemmProblem) -> str | None:
        """None, or the reason for declining ``problem``."""

    def source(self, problem: GemmProblem) -> str:
        """Kernel text (jinja), complete but for the names and sizes that the graph decides."""


# Choices of this process that were logged; compiling the same problem again says nothing new.
SEEN: set[KernelChoice] = set()


def choose(problem: GemmProblem, targets: Sequence[Target]) -> tuple[Target | None, KernelChoice]:
    """The first of ``targets`` that supports ``problem``, None meaning the eager reference.

    A choice is logged when it first comes up: INFO for a target, WARNING for the reference.

    Raises:
        CompileError: ``config.cpu_target`` or ``config.gpu_target`` names no target.
    """
    reasons: list[str] = []
    setting = config.setting(problem.device)
    allowed = _allowed(targets, setting)
    for target in allowed:
        reason = target.supports(problem)
        if reason is None:
            return target, record(problem, target.name, reasons)
        reasons.append(f"{target.name}: {reason}")
    if not allowed:
        reasons.append(f"forced by config.{setting}")
    return None, record(problem, REFERENCE, reasons)


def record(problem: object, target: str, reasons: Sequence[str] = ()) -> KernelChoice:
    """The choice of ``target``, logged if it is new."""
    choice = KernelChoice(str(problem), target, "; ".join(reasons))
    if choice not in SEEN:
        SEEN.add(choice)
        why = f" ({choice.reason})" if choice.reason else ""
        level = logging.WARNING if choice.is_reference else logging.INFO
        log.log(level, "%s: %s%s", problem, target, why)
    return choice


def _allowed(targets: Sequence[Target], setting: str) -> Sequence[Target]:
    forced = getattr(config, setting)
    if forced is None:
        return targets
    names = [target.name for target in targets]
    if forced not in (*names, REFERENCE):
        raise CompileError(
            f"{setting}={forced!r} is unknown; choose one of {', '.join((*names, REFERENCE))}"
        )
    return [target for target in targets if target.name == forced]
