"""Interleaved timing: the candidates take turns, so a drift of the machine hits them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, lowest and highest of the repetitions."""

    median: float
    low: float
    high: float

    def of_each(self, count: int) -> Timing:
        """Of one of ``count`` parts."""
        return Timing(self.median / count, self.low / count, self.high / count)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    budget: float = 0.02,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every candidate ``repetitions`` times in turn, after a warm-up.

    Args:
        budget: seconds that one repetition of a fast candidate is stretched to by calling it
            several times.
        finish: waits until what a candidate started is done, as on a GPU.
    """
    calls = {name: _calls_in(budget, call, finish) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            finish()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing(median(s), min(s), max(s)) for name, s in seconds.items()}


def _calls_in(budget: float, call: Callable[[], object], finish: Callable[[], object]) -> int:
    call()
    finish()
    start = time.perf_counter()
    call()
    finish()
    return max(1, int(budget / max(time.perf_counter() - start, 1e-9)))
