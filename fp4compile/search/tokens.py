"""Calibration tokens of a group, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat
from fp4compile.search.outputs import output_power
from fp4compile.search.problem import GroupProblem
from fp4compile.search.sorted_errors import channel_errors

# One token in so many is not searched on but decides whether the search beats min-max; with
# fewer tokens than HELD_OUT_MINIMUM all are searched on, since so few would say too little.
# Tokens are in order of power: evenly spaced ones have their share of the few that are massive.
HELD_OUT_STRIDE = 8
HELD_OUT_MINIMUM = 512
TINY = 1e-30
SPANS = 64
TOP_SPANS = 8
# At 2 the expected error is infinite; a law that ends sooner than 16 hardly exceeds the maximum.
SMALLEST_INDEX, LARGEST_INDEX = 3.0, 16.0


@dataclass(frozen=True, eq=False)
class Tokens:
    """Calibration tokens ``x`` ``[T, K]`` and how much each counts: ``weight`` ``[T]`` for the
    output error, ``moment_weight`` ``[T]`` for the second moment that weights are rounded by; both
    have mean 1. They are in the order of their output power.

    ``absmax`` ``[K]`` is over all tokens of the calibration, of which ``x`` may be a sample;
    ``tail_weight`` ``[K]`` is how much more tokens of such a maximum would count; how far they may
    lie beyond it, says :func:`tail_index`. ``shrinkage`` of the moment: :func:`shrunk_moment`.
    """

    x: Tensor
    weight: Tensor
    moment_weight: Tensor
    absmax: Tensor
    tail_weight: Tensor
    tail_index: float
    shrinkage: float
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
            tail = self.clipping_errors(maxima[:, None])
            tables = channel_errors(some.x, some.weight, maxima, formats)
            self._tables[key] = [table + tail for table in tables]
        return self._tables[key]

    def clipping_errors(self, maxima: Tensor) -> Tensor:
        """Mean squared error that clipping at ``maxima`` ``[..., K]`` must be expected to add on
        tokens that calibration did not see.

        Of as many again, one lies beyond ``absmax``; how far follows a power law, further than h
        times that with probability ``h^-a``, a being ``tail_index``. So its mean squared error is
        ``absmax^2`` times ``2 r^(2 - a) / ((a - 1) (a - 2))``, or ``a / (a - 2) - 2 r a / (a - 1) +
        r^2`` where ``r = maximum / absmax`` is below 1.
        """
        a = self.tail_index
        ratio = maxima / self.absmax.clamp_min(TINY)
        beyond = 2 / ((a - 1) * (a - 2)) * ratio.clamp_min(1) ** (2 - a)
        within = a / (a - 2) - 2 * a / (a - 1) * ratio + ratio.square()
        return self.tail_weight * self.absmax.square() * torch.where(ratio < 1, within, beyond)

    def thinned(self, size: int) -> Tokens:
        """About ``size`` of them, evenly spaced."""
        step = max(1, round(len(self.x) / size))
        return self[slice(step // 2, None, step)]

    def __getitem__(self, tokens: slice | Tensor) -> Tokens:
        some = self.x[tokens], self.weight[tokens], self.moment_weight[tokens]
        return Tokens(*some, self.absmax, self.tail_weight, self.tail_index, self.shrinkage)

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` with rows times the root of their weight, for sums of weighted squares."""
        return x * self.weight.sqrt()[:, None]

    def moment(self) -> Tensor:
        """Weighted second moment ``[K, K]``, shrunk as :func:`shrunk_moment` says."""
        return shrunk_moment(self.for_moments(self.x), self.shrinkage)

    def for_moments(self, x: Tensor) -> Tensor:
        """``x`` with rows times the root of their weight in moments."""
        return x * self.moment_weight.sqrt()[:, None]


def tail_index(x: Tensor) -> float:
    """The exponent of the power law by which channels of ``x`` ``[T, K]`` exceed their largest
    values: Hill's estimate (1975) from the maxima of spans of tokens, one for all channels.
    """
    maxima = torch.stack([span.abs().amax(dim=0) for span in x.tensor_split(min(SPANS, len(x)))])
    largest = maxima.sort(dim=0, descending=True).values[: TOP_SPANS + 1]
    largest = largest[:, largest[-1] > 0]
    if not largest.numel():
        return LARGEST_INDEX
    inverse = float((largest[:-1] / largest[-1]).log().mean())
    return 1 / min(max(inverse, 1 / LARGEST_INDEX), 1 / SMALLEST_INDEX)


def shrunk_moment(x: Tensor, shrinkage: float) -> Tensor:
    """``x^T x`` of tokens ``[T, K]``, its off-diagonal times ``1 - s``: correlations of many
    channels that few tokens show are partly chance, which compensated rounding would rely on.

    ``s`` is ``shrinkage`` times what has the least expected error if tokens are independent, with
    channels at unit power (Schäfer and Strimmer 2005, after Ledoit and Wolf). Tokens of a sequence
    resemble each other, so 2 is better than 1.
    """
    tokens = len(x)
    moment = x.t() @ x
    diagonal = moment.diagonal().clone()
    inverse = diagonal.clamp_min(TINY).reciprocal()
    square, unit = x.square(), inverse * tokens
    # Sums over pairs of channels: of the mean square of their product, and of its squared mean.
    products = float(((square @ unit).square() - square.square_() @ unit.square()).mean())
    scaled = moment * inverse
    means = float((scaled * scaled.t()).sum() - (diagonal * inverse).sum())
    s = min(1.0, shrinkage * max(0.0, products - means) / (tokens * max(means, TINY)))
    moment.mul_(1 - s).diagonal().copy_(diagonal)
    return moment


def weighted_tokens(problem: GroupProblem) -> Tokens:
    """The sample; a token counts less the more its output power exceeds the mean."""
    statistics, options = problem.statistics, problem.options
    x, absmax = statistics.sample, statistics.absmax
    power, of_maximum = torch.zeros(len(x)), torch.zeros(len(absmax))
    for name, weight in problem.weights.items():
        y = output_power(x, weight, centred=name in problem.heads)
        mean = y.mean().clamp_min(TINY)
        power += y / mean
        of_maximum += weight.square().sum(dim=0) * absmax.square() / mean
    counts = _damped(power, options.sink_power, power)
    in_moments = statistics.sensitivity
    if in_moments is None or not bool(in_moments.any()):
        in_moments = _damped(power, options.weight_sink_power, power)
    tail = _damped(of_maximum, options.sink_power, power) * options.unseen / statistics.tokens
    mean = counts.mean()
    # Else the first tokens of all sequences, attention sinks, could be held out together.
    order = power.argsort(stable=True)
    return Tokens(
        x[order],
        (counts / mean)[order],
        (in_moments / in_moments.mean())[order],
        absmax,
        tail / mean,
        tail_index(x),
        options.moment_shrinkage,
    )


def _damped(power: Tensor, sink_power: float, of_all: Tensor) -> Tensor:
    if sink_power == float("inf"):
        return torch.ones_like(power)
    return 1 / (power + sink_power * of_all.mean().clamp_min(TINY))


def mean_powers(problem: GroupProblem, tokens: Tokens) -> dict[str, Tensor]:
    """Weighted mean of :func:`output_power` by site, 0-d."""
    found = {}
    for name, weight in problem.weights.items():
        power = output_power(tokens.x, weight, centred=name in problem.heads)
        found[name] = (power * tokens.weight).mean()
    return found


def split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """(searched on, held out); the same tokens twice when there are few."""
    if len(tokens.x) < HELD_OUT_MINIMUM:
        return tokens, tokens
    held_out = torch.arange(len(tokens.x)) % HELD_OUT_STRIDE == HELD_OUT_STRIDE // 2
    return tokens[~held_out], tokens[held_out]
