"""Rewrites of a calibrated model, in order; each is one verb and one file."""

from __future__ import annotations

from collections.abc import Callable

from fp4compile.passes.fold_exponent_shifts import fold_exponent_shifts
from fp4compile.passes.plan import Rewrite
from fp4compile.passes.swap_weights import swap_weights

# Each pass reads the graph and extends the plan; nothing touches the model before commit().
PASSES: tuple[Callable[[Rewrite], Rewrite], ...] = (
    # Before packing: it decides the weight scales of producers, and which shifts stay at run time.
    fold_exponent_shifts,
    # Last: from here on the full-precision weights are no longer read.
    swap_weights,
)

__all__ = ["PASSES", "Rewrite"]
