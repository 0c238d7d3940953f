"""What generated code does, as values: which kernel reads which weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCall:
    """One call of ``kernel`` (a target's name, "inductor" for what it made itself, "reference" for
    an eager op) on the graph's ``inputs``; ``epilogue`` names the operations fused behind the GEMM.
    """

    kernel: str
    problem: str
    epilogue: tuple[str, ...]
    inputs: frozenset[int]


@dataclass(frozen=True)
class GeneratedGraph:
    """The calls in the code generated for one graph, and whose codes each of its inputs holds: the
    ids of FP4 weights, several where these were merged into one.
    """

    calls: tuple[KernelCall, ...]
    weights: Mapping[int, frozenset[int]]

    def of(self, weight: object) -> list[KernelCall]:
        """The calls that read ``weight``'s codes."""
        inputs = {number for number, owners in self.weights.items() if id(weight) in owners}
        return [call for call in self.calls if call.inputs & inputs]
