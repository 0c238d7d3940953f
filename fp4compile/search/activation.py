"""Format, clipping and per-channel exponent shifts of one activation, by the output error.

A channel that is shifted by t has its clipping maximum 2^t times the tensor's. On a log2 grid of
maxima the shifted ones are grid points again, so one table of per-channel errors answers every
combination of format, tensor-wise maximum and shifts (LLM-FP4, section 3.3, takes the shifts from
the channel maxima alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat, by_name
from fp4compile.numerics import power_of_two, round_steps, scale_for_max
from fp4compile.qparams import ActivationQParams, TensorSpec
from fp4compile.search.grid import clip_factors
from fp4compile.search.sorted_errors import SortedChannels

# Shifts beyond 2^7 between channels of one tensor are not worth their table rows.
LARGEST_SHIFT = 7
# A few tokens (attention sinks) can be 2^6 times larger than all others.
OCTAVES_BELOW = 6.0
STEPS_PER_OCTAVE = {4: 16, 6: 4, 8: 2}
TOKEN_CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
EXACT_CANDIDATES = 4
# Then the best clipping is refined by these exponents.
REFINEMENTS = (1 / 16, 1 / 32)
RANKING_TOKENS = 512
EXACT_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Tokens:
    """Calibration tokens ``x`` ``[T, K]`` and how much each counts, ``weight`` ``[T]``."""

    x: Tensor
    weight: Tensor
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _by_channel(self) -> SortedChannels:
        return SortedChannels.of(self.x, self.weight)

    def error_table(self, maxima: Tensor, fmt: FloatFormat) -> Tensor:
        """``[len(maxima), K]``: weighted mean squared error of every channel, computed once."""
        key = (fmt.name, tuple(maxima.tolist()))
        if key not in self._tables:
            self._tables[key] = self._by_channel.errors(maxima, fmt)
        return self._tables[key]

    def thinned(self, size: int) -> Tokens:
        """About ``size`` of them, evenly spaced."""
        step = max(1, len(self.x) // size)
        return Tokens(self.x[::step], self.weight[::step])

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` with rows times the root of their weight, for sums of weighted squares."""
        return x * self.weight.sqrt()[:, None]


@dataclass(frozen=True, eq=False)
class ActivationError:
    """Output error of a candidate ``x_hat`` for ``x``: ``|x_hat w_hat^T - x w^T|^2`` summed over
    weighted tokens. ``weight`` and ``quantized_weight`` ``[N, K]`` are those of the whole group,
    each divided by the root of its output power.
    """

    weight: Tensor
    quantized_weight: Tensor

    @cached_property
    def diagonal(self) -> Tensor:
        """Squared norm of every column of ``quantized_weight``, ``[K]``."""
        return self.quantized_weight.square().sum(dim=0)

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        transposed = self.quantized_weight.t()
        return transposed @ self.quantized_weight, transposed @ self.weight

    def exact_on(self, tokens: Tokens) -> Callable[[ActivationQParams], float]:
        """The error of a candidate on ``tokens``, up to a constant that no candidate changes."""
        target = tokens.scaled(tokens.x)
        rows, channels = self.weight.shape
        if rows < channels:
            y = target @ self.weight.t()

            def of_outputs(candidate: ActivationQParams) -> float:
                x_hat = tokens.scaled(apply_activation(tokens.x, candidate))
                return float((x_hat @ self.quantized_weight.t() - y).square().sum())

            return of_outputs
        gram, cross = self._grams
        linear = 2 * target @ cross.t()

        def of_moments(candidate: ActivationQParams) -> float:
            x_hat = tokens.scaled(apply_activation(tokens.x, candidate))
            return float(((x_hat @ gram - linear) * x_hat).sum())

        return of_moments

    def ranking(self, candidate: ActivationQParams, tokens: Tokens) -> float:
        """The activation's part alone, without the correlation between channels."""
        difference = tokens.scaled(apply_activation(tokens.x, candidate) - tokens.x)
        return float(difference.square().sum(dim=0) @ self.diagonal)


def apply_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """Fake-quantize ``x`` ``[T, K]`` as ``fp4::quantize_activation`` does, float32."""
    fmt = by_name(qparams.format)
    shift = qparams.exponent_shift
    values = x if shift is None else x * power_of_two(-shift)
    scale = qparams.scale
    if qparams.granularity == "token":
        scale = scale_for_max(values.abs().amax(dim=-1, keepdim=True) * scale, fmt)
    rounded = round_steps(values * scale.reciprocal(), fmt) * scale
    return rounded if shift is None else rounded * power_of_two(shift)


def minmax_activation(absmax: Tensor, fmt: FloatFormat, granularity: str) -> ActivationQParams:
    """No shift, nothing clipped."""
    static = scale_for_max(absmax.amax(), fmt)
    scale = torch.ones(()) if granularity == "token" else static
    return ActivationQParams(fmt.name, granularity, scale)


def search_activation(
    tokens: Tokens, objective: ActivationError, spec: TensorSpec
) -> ActivationQParams:
    """The candidate with the least output error on ``tokens``."""
    scored = [
        pair for fmt in spec.candidates for pair in _static_candidates(tokens, objective, fmt, spec)
    ]
    if spec.granularity == "token":
        few = tokens.thinned(RANKING_TOKENS)
        candidates = _per_token([candidate for _, candidate in scored])
        scored = [(objective.ranking(candidate, few), candidate) for candidate in candidates]
    scored.sort(key=lambda pair: pair[0])
    exact = objective.exact_on(tokens.thinned(EXACT_TOKENS))
    best = min(
        ((exact(candidate), candidate) for _, candidate in scored[:EXACT_CANDIDATES]),
        key=lambda pair: pair[0],
    )
    for step in REFINEMENTS:
        for exponent in (step, -step):
            moved = replace(best[1], scale=best[1].scale * 2.0**exponent)
            best = min(best, (exact(moved), moved), key=lambda pair: pair[0])
    return best[1]


def _static_candidates(
    tokens: Tokens, objective: ActivationError, fmt: FloatFormat, spec: TensorSpec
) -> Sequence[tuple[float, ActivationQParams]]:
    """The best tensor-wise maxima of one format, each with its best shifts and their error."""
    largest = min(fmt.max_shift, LARGEST_SHIFT) if spec.exponent_shift else 0
    steps = STEPS_PER_OCTAVE[spec.bits]
    maxima = tokens.x.abs().amax() * clip_factors(steps, OCTAVES_BELOW + largest)
    table = tokens.error_table(maxima, fmt)
    found = []
    for position, maximum in enumerate(maxima):
        rows = [position - steps * t for t in range(largest + 1) if position >= steps * t]
        errors, shift = table[rows].min(dim=0)
        kept_shift = shift.to(torch.int8) if bool(shift.any()) else None
        candidate = ActivationQParams(fmt.name, "tensor", scale_for_max(maximum, fmt), kept_shift)
        found.append((float(errors @ objective.diagonal), candidate))
    found.sort(key=lambda pair: pair[0])
    return found[:EXACT_CANDIDATES]


def _per_token(static: Sequence[ActivationQParams]) -> list[ActivationQParams]:
    """Dynamic candidates: the formats and shifts of ``static`` with every clip ratio."""
    seen: dict[tuple[str, tuple[int, ...]], ActivationQParams] = {}
    for candidate in static:
        shift = candidate.exponent_shift
        seen.setdefault(
            (candidate.format, () if shift is None else tuple(shift.tolist())), candidate
        )
    return [
        ActivationQParams(candidate.format, "token", torch.tensor(ratio), candidate.exponent_shift)
        for candidate in seen.values()
        for ratio in TOKEN_CLIP_RATIOS
    ]
