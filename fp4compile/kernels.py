"""Which kernel serves which GEMM: filled by the lowerings, read by the report."""

from __future__ import annotations

from dataclasses import dataclass

_CHOICES: dict[str, KernelChoice] = {}


@dataclass(frozen=True)
class KernelChoice:
    """``target`` computes ``problem``; ``reason`` says why targets before it declined."""

    problem: str
    target: str
    reason: str


def record_choice(choice: KernelChoice) -> None:
    """Remember the choice for its problem; the latest compile of a problem counts."""
    _CHOICES[choice.problem] = choice


def kernel_choices() -> tuple[KernelChoice, ...]:
    """Choices of this process, in the order in which the problems first came up."""
    return tuple(_CHOICES.values())
