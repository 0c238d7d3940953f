"""Which kernel serves which GEMM: decided by the lowerings, told by the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelChoice:
    """``target`` computes ``problem``; ``reason`` says why the targets before it declined.
    ``"reference"`` is the op's eager code: correct and slow.
    """

    problem: str
    target: str
    reason: str

    @property
    def is_reference(self) -> bool:
        return self.target == REFERENCE


REFERENCE = "reference"
