"""How far a calibration is, and when it will be done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from fp4compile.formats import by_name
from fp4compile.numerics import fake_quantize

logger = logging.getLogger(__name__)

# The time left is told once this many groups say how fast it goes here.
MEASURED_GROUPS = 2
# Cost of searching a group, in roundings of one value: per token and channel of its sample, and per
# weight (measured on fpq; other methods take 0.1 to 2 times as long).
TOKEN_ROUNDINGS = 70
WEIGHT_ROUNDINGS = 180
PROBE_SHAPE = (512, 1024)
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


def estimated_seconds(values: Iterable[tuple[int, int]]) -> float:
    """A rough estimate of a search before it starts, by timing a few roundings here.

    Args:
        values: (sample values, weights) of every group.
    """
    roundings = sum(TOKEN_ROUNDINGS * x + WEIGHT_ROUNDINGS * weights for x, weights in values)
    x, scale, fmt = torch.randn(PROBE_SHAPE), torch.tensor(0.3), by_name("e2m1")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fake_quantize(x, fmt, scale)
        seconds.append(time.perf_counter() - start)
    return roundings * min(seconds) / x.numel()


class Progress:
    """A bar over the ``cost`` of all groups (their number of weights), with the site's name."""

    def __init__(self, cost: int, groups: int, *, show: bool) -> None:
        self._bar = tqdm(
            total=cost, desc="calibrate", bar_format=BAR_FORMAT, disable=not show, smoothing=0.1
        )
        self._cost, self._groups = cost, groups
        self._done_cost = self._done_groups = 0
        self._told = False
        self._started = time.monotonic()

    def at(self, name: str) -> None:
        """The next group's first site is ``name``."""
        self._bar.set_postfix_str(name)

    def advance(self, cost: int, groups: int) -> None:
        """So many more groups are decided."""
        self._bar.update(cost)
        self._done_cost += cost
        self._done_groups += groups
        if not self._told and MEASURED_GROUPS <= self._done_groups < self._groups:
            self._tell()

    def _tell(self) -> None:
        elapsed = time.monotonic() - self._started
        logger.info(
            "calibration: the first %d of %d groups took %.0f s; about %.0f s more",
            self._done_groups,
            self._groups,
            elapsed,
            elapsed / max(self._done_cost, 1) * (self._cost - self._done_cost),
        )
        self._told = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
