"""Choosing a target for a problem, and the record of what was chosen and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fp4compile.errors import CompileError
from fp4compile.lowering.config import config
from fp4compile.lowering.problem import GemmProblem

log = logging.getLogger("fp4compile.lowering")

REFERENCE = "reference"


class Target(Protocol):
    """A backend for GEMMs."""

    @property
    def name(self) -> str:
        """What ``config.cpu_target`` calls it."""

    def supports(self, problem: GemmProblem) -> str | None:
        """None, or the reason for declining ``problem``."""

    def source(self, problem: GemmProblem) -> str:
        """Kernel text (jinja), complete but for the names and sizes that the graph decides."""


@dataclass(frozen=True)
class KernelChoice:
    """``target`` computes ``problem``; ``reason`` says why better ones do not."""

    problem: GemmProblem
    target: str
    reason: str


CHOICES: dict[GemmProblem, KernelChoice] = {}


def choose(problem: GemmProblem, targets: Sequence[Target]) -> Target | None:
    """The first of ``targets`` that supports ``problem``; None means the eager reference.

    Raises:
        CompileError: ``config.cpu_target`` names no target.
    """
    allowed = _allowed(targets)
    reasons: list[str] = []
    for target in allowed:
        reason = target.supports(problem)
        if reason is None:
            _record(KernelChoice(problem, target.name, "; ".join(reasons)))
            return target
        reasons.append(f"{target.name}: {reason}")
    if not allowed:
        reasons.append("forced by config.cpu_target")
    _record(KernelChoice(problem, REFERENCE, "; ".join(reasons)))
    return None


def _allowed(targets: Sequence[Target]) -> Sequence[Target]:
    forced = config.cpu_target
    if forced is None:
        return targets
    names = [target.name for target in targets]
    if forced not in (*names, REFERENCE):
        raise CompileError(
            f"cpu_target={forced!r} is unknown; choose one of {', '.join((*names, REFERENCE))}"
        )
    return [target for target in targets if target.name == forced]


def _record(choice: KernelChoice) -> None:
    CHOICES[choice.problem] = choice
    why = f" ({choice.reason})" if choice.reason else ""
    level = logging.WARNING if choice.target == REFERENCE else logging.INFO
    log.log(level, "%s: %s%s", choice.problem, choice.target, why)
