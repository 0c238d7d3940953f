"""Format, clipping and per-channel exponent shifts of one activation, by the output error.

A channel that is shifted by t has its clipping maximum 2^t times the tensor's. On a log2 grid of
maxima the shifted ones are grid points again, so one table of per-channel errors answers every
combination of format, tensor-wise maximum and shifts (LLM-FP4, section 3.3, takes the shifts from
the channel maxima alone).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat, alternatives
from fp4compile.numerics import scale_for_max
from fp4compile.qparams import ActivationQParams, TensorSpec, WeightQParams
from fp4compile.search.candidates import apply_activation, clipping_errors
from fp4compile.search.grid import clip_factors
from fp4compile.search.problem import GroupProblem, SearchOptions
from fp4compile.search.ties import tied_maxima, tied_sums
from fp4compile.search.tokens import TINY, Tokens
from fp4compile.weights import dequantized, row_parts

# Shifts beyond 2^7 between channels of one tensor are not worth their table rows.
LARGEST_SHIFT = 7
# A few tokens (attention sinks) can be 2^6 times larger than all others.
OCTAVES_BELOW = 6.0
# Finer formats can afford to clip nothing of larger tokens than calibration saw.
OCTAVES_ABOVE = {4: 0, 6: 2, 8: 4}
STEPS_PER_OCTAVE = {4: 8, 6: 4, 8: 2}
TOKEN_CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
EXACT_CANDIDATES = 4
# Then the best clipping is refined by these exponents.
REFINEMENTS = (1 / 16, 1 / 32)
# Fine formats have many cells to look up, and small errors that few tokens tell.
TABLE_TOKENS = {4: 2048, 6: 2048, 8: 1024}
RANKING_TOKENS = 512
EXACT_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class ActivationError:
    """Output error of a candidate ``x_hat`` for ``x``: ``|x_hat w_hat^T - x w^T|^2``, mean over
    weighted tokens, summed over ``sites``, each divided by its mean output power.

    ``gram`` ``[K, K]`` is ``w_hat^T w_hat`` and ``cross`` ``w_hat^T w`` of all sites' weights,
    divided by the power; ``weights`` ``(w, w_hat)`` themselves, ``[N, K]``, where N < K makes them
    cheaper. Of a head, both are less their mean row (``outputs.py``). ``ties``: the problem's
    ``channel_ties``.
    """

    sites: int
    gram: Tensor
    cross: Tensor
    weights: tuple[Tensor, Tensor] | None
    ties: Tensor | None

    @classmethod
    def of(
        cls,
        problem: GroupProblem,
        qparams: Mapping[str, WeightQParams],
        powers: Mapping[str, Tensor],
    ) -> ActivationError:
        """For the sites of ``problem``; ``powers`` as of :func:`mean_powers`."""
        channels = next(iter(problem.weights.values())).shape[1]
        gram, cross = torch.zeros(2, channels, channels)
        kept = []
        outputs = sum(len(weight) for weight in problem.weights.values())
        keep = outputs < channels and not problem.heads
        for name, weight in problem.weights.items():
            factor = powers[name].clamp_min(TINY).rsqrt()
            total, total_hat = torch.zeros(2, channels)
            for rows, part in row_parts(weight, qparams[name]):
                w, w_hat = rows * factor, dequantized(rows, part) * factor
                gram.addmm_(w_hat.t(), w_hat)
                cross.addmm_(w_hat.t(), w)
                total += w.sum(dim=0)
                total_hat += w_hat.sum(dim=0)
                if keep:
                    kept.append((w, w_hat))
            if name in problem.heads:
                gram.addr_(total_hat, total_hat, alpha=-1 / len(weight))
                cross.addr_(total_hat, total, alpha=-1 / len(weight))
        both = tuple(torch.cat(side) for side in zip(*kept, strict=True)) if keep else None
        sites, ties = len(problem.weights), problem.channel_ties
        return cls(sites, gram, cross, both, ties)  # type: ignore[arg-type]  # two of them

    @property
    def diagonal(self) -> Tensor:
        """Squared norm of every column of the quantized weights, ``[K]``."""
        return self.gram.diagonal()

    def exact_on(self, tokens: Tokens) -> Callable[[ActivationQParams], float]:
        """The error of a candidate on ``tokens``, relative to the output power of one site."""
        target = tokens.scaled(tokens.x)

        def unseen(candidate: ActivationQParams) -> float:
            return float(clipping_errors(tokens, candidate) @ self.diagonal)

        if self.weights is not None:
            weight, quantized_weight = self.weights
            y = target @ weight.t()

            def of_outputs(candidate: ActivationQParams) -> float:
                x_hat = tokens.scaled(apply_activation(tokens.x, candidate))
                seen = float((x_hat @ quantized_weight.t() - y).square().sum()) / len(y)
                return seen + unseen(candidate)

            return of_outputs
        linear = 2 * target @ self.cross.t()

        def of_moments(candidate: ActivationQParams) -> float:
            x_hat = tokens.scaled(apply_activation(tokens.x, candidate))
            seen = float(((x_hat @ self.gram - linear) * x_hat).sum()) / len(x_hat)
            return self.sites + seen + unseen(candidate)

        return of_moments

    def ranking(self, candidate: ActivationQParams, tokens: Tokens) -> float:
        """The activation's part alone, without the correlation between channels."""
        difference = tokens.scaled(apply_activation(tokens.x, candidate) - tokens.x)
        seen = difference.square().mean(dim=0)
        return float((seen + clipping_errors(tokens, candidate)) @ self.diagonal)


def search_activation(
    tokens: Tokens, objective: ActivationError, spec: TensorSpec, options: SearchOptions
) -> ActivationQParams:
    """The candidate with the least output error on ``tokens``; one of the int8 route if its error
    is at most ``1 + options.format_margin`` times that.
    """
    scored = _static_candidates(tokens, objective, spec, options.shift_choice)
    if spec.granularity == "token":
        few = tokens.thinned(RANKING_TOKENS)
        candidates = _per_token([candidate for _, candidate in scored])
        scored = [(objective.ranking(candidate, few), candidate) for candidate in candidates]
    scored.sort(key=lambda pair: pair[0])
    exact = objective.exact_on(tokens.thinned(EXACT_TOKENS))
    shortlist = scored[:EXACT_CANDIDATES]
    if not any(_on_int8_route(candidate) for _, candidate in shortlist):
        shortlist += [pair for pair in scored if _on_int8_route(pair[1])][:1]
    best = preferred(
        [(exact(candidate), candidate) for _, candidate in shortlist], options.format_margin
    )
    for step in REFINEMENTS:
        for exponent in (step, -step):
            moved = replace(best[1], scale=best[1].scale * 2.0**exponent)
            best = min(best, (exact(moved), moved), key=lambda pair: pair[0])
    return best[1]


def _on_int8_route(candidate: ActivationQParams) -> bool:
    return all(fmt.fits_int8 for fmt in alternatives(candidate.format))


def preferred(
    scored: Sequence[tuple[float, ActivationQParams]], margin: float
) -> tuple[float, ActivationQParams]:
    """The best pair, or the best on the int8 route if its error is within ``margin`` of it."""
    best = min(scored, key=lambda pair: pair[0])
    fast = [pair for pair in scored if _on_int8_route(pair[1])]
    if not fast:
        return best
    best_fast = min(fast, key=lambda pair: pair[0])
    return best_fast if best_fast[0] <= (1 + margin) * best[0] else best


def widest_shift(tokens: Tokens, objective: ActivationError, spec: TensorSpec) -> Tensor | None:
    """int8 ``[K]``: the shifts of the best candidate if weights take them up, which the operand's
    range does not bound.
    """
    scored = _static_candidates(tokens, objective, spec, "error", in_weights=True)
    return min(scored, key=lambda pair: pair[0])[1].exponent_shift


def _static_candidates(
    tokens: Tokens,
    objective: ActivationError,
    spec: TensorSpec,
    shift_choice: str,
    *,
    in_weights: bool = False,
) -> list[tuple[float, ActivationQParams]]:
    """The best tensor-wise maxima of every format, each with its best shifts and their error."""
    if not spec.exponent_shift:
        return _unshifted_candidates(tokens, objective, spec)
    formats = spec.candidates
    largest = {f.name: LARGEST_SHIFT if in_weights else _largest_shift(f) for f in formats}
    steps = STEPS_PER_OCTAVE[spec.bits]
    maxima = _maxima(tokens, spec, OCTAVES_BELOW + max(largest.values()))
    kept = []
    for fmt, table in zip(
        formats, tokens.error_tables(maxima, formats, TABLE_TOKENS[spec.bits]), strict=True
    ):
        found = []
        for position, maximum in enumerate(maxima):
            # Row t: the errors of every channel if it is shifted by t.
            rows = list(range(position, -1, -steps)[: largest[fmt.name] + 1])
            ratio = tokens.absmax / maximum if shift_choice == "maximum" else None
            error, shift = _best_shifts(table[rows], objective, ratio)
            scale = scale_for_max(maximum, fmt)
            found.append((error, ActivationQParams(fmt.name, "tensor", scale, shift)))
        found.sort(key=lambda pair: pair[0])
        kept += found[:EXACT_CANDIDATES]
    return kept


def _unshifted_candidates(
    tokens: Tokens, objective: ActivationError, spec: TensorSpec
) -> list[tuple[float, ActivationQParams]]:
    """As :func:`_static_candidates`, without a table: all channels have one maximum."""
    few = tokens.thinned(RANKING_TOKENS)
    maxima = _maxima(tokens, spec, OCTAVES_BELOW)
    kept = []
    for fmt in spec.candidates:
        candidates = [
            ActivationQParams(fmt.name, "tensor", scale_for_max(maximum, fmt)) for maximum in maxima
        ]
        found = [(objective.ranking(candidate, few), candidate) for candidate in candidates]
        found.sort(key=lambda pair: pair[0])
        kept += found[:EXACT_CANDIDATES]
    return kept


def _maxima(tokens: Tokens, spec: TensorSpec, octaves_below: float) -> Tensor:
    """Candidate clipping maxima of the tensor, descending."""
    steps = STEPS_PER_OCTAVE[spec.bits]
    above = 1 + OCTAVES_ABOVE[spec.bits] * steps
    return tokens.absmax.amax() * clip_factors(steps, octaves_below, above)


def _largest_shift(fmt: FloatFormat) -> int:
    return min(fmt.max_shift, LARGEST_SHIFT)


def _best_shifts(
    errors: Tensor, objective: ActivationError, ratio: Tensor | None
) -> tuple[float, Tensor | None]:
    """(error, int8 shifts ``[K]`` or None) of least error by ``errors`` ``[shifts, K]``; with
    ``ratio`` ``[K]``, of channel maxima to the tensor's, the least shifts that clip nothing.
    """
    ties = objective.ties
    if ratio is not None:
        ratio = tied_maxima(ratio, ties)
        shift = ratio.clamp_min(TINY).log2().ceil().clamp(0, len(errors) - 1).to(torch.int64)
    elif ties is None:
        shift = errors.min(dim=0).indices
    else:
        shift = tied_sums(errors * objective.diagonal, ties).min(dim=0).indices
    error = float(errors.gather(0, shift[None])[0] @ objective.diagonal)
    return error, shift.to(torch.int8) if bool(shift.any()) else None


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
