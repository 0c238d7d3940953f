"""The strongest combination at the same bits: smoothing by powers of two, block-Hadamard rotation,
E4M3 block scales with two formats, and error-compensated rounding.

The transform of the activation is chosen per group of sites by the output error: none, exponent
shifts moved into the weight (LLM-FP4's pre-shifted exponent bias, chosen to balance activations
and weights), or these and a rotation, which spreads what outliers are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.blocks import outer_scale
from fp4compile.numerics import scale_for_max
from fp4compile.operand import largest_rotation, transformed
from fp4compile.qparams import ActivationQParams, QuantSpec, SiteQParams, TensorSpec, WeightQParams
from fp4compile.search.activation import preferred
from fp4compile.search.balance import balancing_shift, transformed_moment
from fp4compile.search.candidates import (
    ERROR_TOKENS,
    Decision,
    accepted,
    blocked_weight,
    output_errors,
)
from fp4compile.search.embedding import lookup_moment, tied_moment
from fp4compile.search.gptq import Compensation
from fp4compile.search.noise import noisy_inputs
from fp4compile.search.problem import GroupProblem, SearchOptions
from fp4compile.search.tokens import Tokens, split, weighted_tokens
from fp4compile.search.weight import OutputError, search_weight
from fp4compile.weights import for_activation

BLOCK_SIZE = 32
# Between these every block chooses.
BLOCK_FORMATS = {4: ("e2m1", "e1m2"), 6: ("e2m3", "e1m4")}
# A block may clip its maximum to this factor: the largest value gets worse, the others better.
BLOCK_CLIP = 0.85
# Blocks of activations beyond what calibration saw, before the E4M3 scale saturates.
HEADROOM = 4.0
# Largest sizes of the Hadamard rotations to choose from.
ROTATIONS = (64, 512)
CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7)
# Rows of a large weight that the transform is chosen on.
CHOICE_ROWS = 2048


def block_spec(spec: QuantSpec) -> QuantSpec:
    """``spec`` with the granularities of this method where it leaves them at their defaults:
    blocks up to 6 bits, else weights per channel and activations per token.
    """
    return QuantSpec(
        _in_blocks(spec.weight),
        None if spec.activation is None else _in_blocks(spec.activation),
        None if spec.embedding is None else _in_blocks(spec.embedding),
    )


def _in_blocks(spec: TensorSpec) -> TensorSpec:
    if spec.formats or spec.granularity not in ("channel", "tensor"):
        return spec
    if spec.bits in BLOCK_FORMATS:
        formats = BLOCK_FORMATS[spec.bits]
        return TensorSpec(spec.bits, formats, "block", block_size=BLOCK_SIZE)
    return spec if spec.granularity == "channel" else replace(spec, granularity="token")


def best(problem: GroupProblem) -> dict[str, SiteQParams]:
    """The full search. What does not beat min-max on held-out tokens is not accepted."""
    problem = replace(problem, spec=block_spec(problem.spec))
    train, held_out = split(weighted_tokens(problem))
    return accepted(problem, held_out, [transformed_decision(problem, train)])


def transformed_decision(problem: GroupProblem, tokens: Tokens) -> Decision:
    """The activation's transform and format of least error, then the weights for it."""
    activation = None
    if problem.spec.activation is not None:
        activation = _choose_activation(problem, tokens, problem.spec.activation)
    moment = tokens.moment()
    noisy = noisy_inputs(tokens, _transformed(moment, activation), activation)
    shared = Compensation(noisy.moment)
    weights = dict(problem.decided)
    for name, weight in problem.weights.items():
        if name in weights:
            continue
        working = for_activation(weight, activation)
        if name in problem.tied:
            tied = tied_moment(weight, moment, problem.options)
            seen = Compensation(_transformed(tied, activation))
        else:
            seen, working = shared, noisy.best_weight(working)
        weights[name] = _rounded(working, seen, problem.spec.weight, problem.options)
    return weights, activation


def best_embedding(
    weight: Tensor, spec: TensorSpec, head_moment: Tensor | None, options: SearchOptions
) -> WeightQParams:
    """Block scales; compensated if the weight ``[N, K]`` is tied to a head of input
    ``head_moment``.
    """
    if head_moment is None:
        moment, options = lookup_moment(weight), replace(options, rounding="nearest")
    else:
        moment = tied_moment(weight, head_moment, options)
    return _rounded(weight, Compensation(moment), _in_blocks(spec), options)


def _transformed(moment: Tensor, activation: ActivationQParams | None) -> Tensor:
    if activation is None:
        return moment
    return transformed_moment(moment, activation.exponent_shift, activation.rotation)


def _rounded(
    weight: Tensor, seen: Compensation, spec: TensorSpec, options: SearchOptions
) -> WeightQParams:
    found = _nearest(weight, seen.moment, spec)
    if options.rounding == "nearest":
        return found
    return seen.rounded(weight, found) if spec.block_size else seen.rescaled(weight, found)


def _nearest(weight: Tensor, moment: Tensor, spec: TensorSpec) -> WeightQParams:
    if spec.granularity != "block":
        return search_weight(weight, OutputError.of_inputs(moment), spec.candidates)
    diagonal = moment.diagonal()
    return blocked_weight(weight, spec.candidates, spec.block_size, (1.0, BLOCK_CLIP), diagonal)


def _choose_activation(
    problem: GroupProblem, tokens: Tokens, spec: TensorSpec
) -> ActivationQParams:
    """The candidate with the least output error, weights rounded to nearest."""
    some = tokens.thinned(ERROR_TOKENS)
    few = problem.thinned(CHOICE_ROWS)
    moment = some.moment()
    scored = []
    for shift, rotation in _transforms(problem, tokens):
        weights: dict[str, WeightQParams] = {}
        for candidate in _activations(tokens.x, spec, shift, rotation):
            weights = weights or {
                name: _nearest(
                    for_activation(weight, candidate),
                    transformed_moment(moment, shift, rotation),
                    problem.spec.weight,
                )
                for name, weight in few.weights.items()
            }
            error = sum(output_errors(few, some, weights, candidate).values())
            scored.append((error, candidate))
    return preferred(scored, problem.options.format_margin)[1]


def _transforms(problem: GroupProblem, tokens: Tokens) -> list[tuple[Tensor | None, int]]:
    """(exponent shift, rotation) to choose from."""
    if problem.decided:
        return [(None, 1)]  # the weight was quantized as it is
    options, channels = problem.options, tokens.x.shape[1]
    shift = balancing_shift(problem, tokens) if options.balance else None
    sizes = {
        largest_rotation(channels, min(limit, options.largest_rotation)) for limit in ROTATIONS
    }
    plain: list[tuple[Tensor | None, int]] = (
        [(None, 1)] if shift is None else [(None, 1), (shift, 1)]
    )
    return [*plain, *((shift, size) for size in sorted(sizes) if size > 1)]


def _activations(
    x: Tensor, spec: TensorSpec, shift: Tensor | None, rotation: int
) -> Iterator[ActivationQParams]:
    """Candidates with one transform."""
    absmax = transformed(x, shift, rotation).abs().amax()
    if spec.granularity == "block":
        outer = outer_scale(HEADROOM * absmax, spec.candidates)
        scales = [("|".join(fmt.name for fmt in spec.candidates), outer)]
    else:
        scales = [
            (fmt.name, ratio if spec.granularity == "token" else scale_for_max(absmax * ratio, fmt))
            for fmt in spec.candidates
            for ratio in torch.tensor(CLIP_RATIOS)
        ]
    for name, scale in scales:
        yield ActivationQParams(
            name,
            spec.granularity,
            scale,
            shift,
            shift_in_weight=shift is not None,
            rotation=rotation,
            block_size=spec.block_size,
            block_clip=BLOCK_CLIP if spec.block_size else 1.0,
        )
