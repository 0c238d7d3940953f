"""Calibration tokens of a group, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat
from fp4compile.search.problem import GroupProblem
from fp4compile.search.sorted_errors import channel_errors

# One token in so many is not searched on but decides whether the search beats min-max; with
# fewer tokens than HELD_OUT_MINIMUM all are searched on, since so few would say too little.
HELD_OUT_STRIDE = 8
HELD_OUT_MINIMUM = 512
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Tokens:
    """Calibration tokens ``x`` ``[T, K]`` and how much each counts: ``weight`` ``[T]`` for the
    output error, ``moment_weight`` ``[T]`` for the second moment that weights are rounded by.
    """

    x: Tensor
    weight: Tensor
    moment_weight: Tensor
    _tables: dict[Any, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def error_tables(
        self, maxima: Tensor, formats: Sequence[FloatFormat], size: int
    ) -> list[Tensor]:
        """``[len(maxima), K]`` per format: weighted mean squared error of every channel on about
        ``size`` tokens, computed once.
        """
        key = (tuple(fmt.name for fmt in formats), tuple(maxima.tolist()))
        if key not in self._tables:
            some = self.thinned(size)
            self._tables[key] = channel_errors(some.x, some.weight, maxima, formats)
        return self._tables[key]

    def thinned(self, size: int) -> Tokens:
        """About ``size`` of them, evenly spaced."""
        step = max(1, round(len(self.x) / size))
        return self[slice(None, None, step)]

    def __getitem__(self, tokens: slice | Tensor) -> Tokens:
        return Tokens(self.x[tokens], self.weight[tokens], self.moment_weight[tokens])

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` with rows times the root of their weight, for sums of weighted squares."""
        return x * self.weight.sqrt()[:, None]

    def mean_power(self, weight: Tensor) -> Tensor:
        """Weighted mean of ``|x W^T|^2``, 0-d."""
        return (output_power(self.x, weight) * self.weight).mean()

    def moment(self) -> Tensor:
        """Weighted second moment ``[K, K]``."""
        x = self.for_moments(self.x)
        return x.t() @ x

    def for_moments(self, x: Tensor) -> Tensor:
        """``x`` with rows times the root of their weight in moments."""
        return x * self.moment_weight.sqrt()[:, None]


def weighted_tokens(problem: GroupProblem) -> Tokens:
    """The sample; a token counts less the more its output power exceeds the mean."""
    x, options = problem.statistics.sample, problem.options
    power = torch.zeros(len(x))
    for weight in problem.weights.values():
        y = output_power(x, weight)
        power += y / y.mean().clamp_min(TINY)
    return Tokens(x, _damped(power, options.sink_power), _damped(power, options.weight_sink_power))


def _damped(power: Tensor, sink_power: float) -> Tensor:
    if sink_power == float("inf"):
        return torch.ones_like(power)
    return 1 / (power + sink_power * power.mean().clamp_min(TINY))


def output_power(x: Tensor, weight: Tensor) -> Tensor:
    """``|x W^T|^2`` of every token ``[T]``; a head has far more outputs than channels."""
    rows, channels = weight.shape
    if rows < channels:
        return (x @ weight.t()).square().sum(dim=1)
    return (x @ (weight.t() @ weight) * x).sum(dim=1)


def split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """(searched on, held out); the same tokens twice when there are few."""
    if len(tokens.x) < HELD_OUT_MINIMUM:
        return tokens, tokens
    held_out = torch.arange(len(tokens.x)) % HELD_OUT_STRIDE == 0
    return tokens[~held_out], tokens[held_out]
