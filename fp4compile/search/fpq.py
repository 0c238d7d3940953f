"""FPQ: joint search of formats, clipping and exponent shifts (LLM-FP4, sections 3.2 and 3.3).

Weights and activations are searched in turn, each given the other, by the error of the layer
output with both quantized. A token's error counts less the more its output power exceeds the mean:
else the few tokens with massive activations (attention sinks) would decide alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat, by_name
from fp4compile.numerics import fake_quantize
from fp4compile.qparams import ActivationQParams, SiteQParams, TensorSpec, WeightQParams
from fp4compile.search.activation import (
    ActivationError,
    Tokens,
    apply_activation,
    minmax_activation,
    search_activation,
)
from fp4compile.search.problem import GroupProblem
from fp4compile.search.weight import MINMAX_FORMATS, OutputError, minmax_weight, search_weight

ROUNDS = 3
# One token in so many is not searched on but decides whether the search beats min-max; with
# fewer tokens than HELD_OUT_MINIMUM all are searched on, since so few would say too little.
HELD_OUT_STRIDE = 8
HELD_OUT_MINIMUM = 512
# Tokens of less output power than this many times the mean count about the same.
SINK_POWER = 4.0
TINY = 1e-30


def minmax(problem: GroupProblem) -> dict[str, SiteQParams]:
    """Formats of :data:`MINMAX_FORMATS`; nothing is clipped, nothing searched."""
    weights, activation = _minmax(problem)
    errors = _errors(problem, _all_tokens(problem), weights, activation)
    return {
        name: SiteQParams(weights[name], activation, error, error) for name, error in errors.items()
    }


def fpq_baseline(problem: GroupProblem) -> dict[str, SiteQParams]:
    """FPQ without per-channel exponent shifts (the "FPQ baseline" of the paper's tables)."""
    spec = problem.spec
    if spec.activation is not None:
        spec = replace(spec, activation=replace(spec.activation, exponent_shift=False))
    return fpq(replace(problem, spec=spec))


def fpq(problem: GroupProblem) -> dict[str, SiteQParams]:
    """The full search. What does not beat min-max on held-out tokens is not accepted."""
    tokens = _all_tokens(problem)
    train, test = _split(tokens)
    weights, activation = _alternate(problem, train)
    found = _errors(problem, test, weights, activation)
    base_weights, base_activation = _minmax(problem)
    base = _errors(problem, test, base_weights, base_activation)
    if sum(found.values()) > sum(base.values()):
        weights, activation, found = base_weights, base_activation, base
    return {
        name: SiteQParams(weights[name], activation, found[name], base[name])
        for name in problem.weights
    }


def _all_tokens(problem: GroupProblem) -> Tokens:
    x = problem.statistics.sample
    power = torch.zeros(len(x))
    for weight in problem.weights.values():
        # A head has far more outputs than channels: x W^T is never formed.
        y = (x @ (weight.t() @ weight) * x).sum(dim=1)
        power += y / y.mean().clamp_min(TINY)
    return Tokens(x, 1 / (power + SINK_POWER * power.mean().clamp_min(TINY)))


def _split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """(searched on, held out); the same tokens twice when there are few."""
    if len(tokens.x) < HELD_OUT_MINIMUM:
        return tokens, tokens
    held_out = torch.arange(len(tokens.x)) % HELD_OUT_STRIDE == 0
    return (
        Tokens(tokens.x[~held_out], tokens.weight[~held_out]),
        Tokens(tokens.x[held_out], tokens.weight[held_out]),
    )


def _alternate(
    problem: GroupProblem, tokens: Tokens
) -> tuple[dict[str, WeightQParams], ActivationQParams | None]:
    spec = problem.spec
    x = tokens.scaled(tokens.x)
    weights = _search_weights(problem, OutputError.of_inputs(x.t() @ x), spec.weight.candidates)
    if spec.activation is None:
        return weights, None
    best: tuple[float, dict[str, WeightQParams], ActivationQParams] | None = None
    for _ in range(ROUNDS):
        activation = _search_activation(problem, tokens, weights, spec.activation)
        error = sum(_errors(problem, tokens, weights, activation).values())
        if best is not None and error >= best[0]:
            break
        best = (error, weights, activation)
        seen = OutputError.of_samples(tokens.scaled(apply_activation(tokens.x, activation)), x)
        weights = _search_weights(problem, seen, None, weights)
    assert best is not None
    return best[1], best[2]


def _search_weights(
    problem: GroupProblem,
    objective: OutputError,
    formats: Sequence[FloatFormat] | None,
    chosen: Mapping[str, WeightQParams] | None = None,
) -> dict[str, WeightQParams]:
    """Search all weights over ``formats``, or over the format already ``chosen`` for each."""
    found = {}
    for name, weight in problem.weights.items():
        if name in problem.decided:
            found[name] = problem.decided[name]
            continue
        candidates = formats or (by_name((chosen or {})[name].format),)
        found[name] = search_weight(weight, objective, candidates)
    return found


def _search_activation(
    problem: GroupProblem, tokens: Tokens, weights: Mapping[str, WeightQParams], spec: TensorSpec
) -> ActivationQParams:
    some = tokens.thinned(1024)
    full, quantized = [], []
    for name, weight in problem.weights.items():
        power = some.scaled(some.x @ weight.t()).square().sum(dim=1).mean()
        full.append(weight / power.clamp_min(TINY).sqrt())
        quantized.append(dequantized(weight, weights[name]) / power.clamp_min(TINY).sqrt())
    return search_activation(tokens, ActivationError(torch.cat(full), torch.cat(quantized)), spec)


def _minmax(problem: GroupProblem) -> tuple[dict[str, WeightQParams], ActivationQParams | None]:
    fmt = by_name(MINMAX_FORMATS[problem.spec.weight.bits])
    weights = {
        name: problem.decided.get(name) or minmax_weight(weight, fmt)
        for name, weight in problem.weights.items()
    }
    spec = problem.spec.activation
    if spec is None:
        return weights, None
    fmt = by_name(MINMAX_FORMATS[spec.bits])
    return weights, minmax_activation(problem.statistics.absmax, fmt, spec.granularity)


def _errors(
    problem: GroupProblem,
    tokens: Tokens,
    weights: Mapping[str, WeightQParams],
    activation: ActivationQParams | None,
) -> dict[str, float]:
    """Relative output error of every site with weights and activation quantized, on weighted
    tokens; about 1000 of them.
    """
    some = tokens.thinned(1024)
    x = some.scaled(some.x)
    x_hat = x if activation is None else some.scaled(apply_activation(some.x, activation))
    errors = {}
    for name, weight in problem.weights.items():
        y = x @ weight.t()
        y_hat = x_hat @ dequantized(weight, weights[name]).t()
        errors[name] = float((y_hat - y).square().sum() / y.square().sum().clamp_min(TINY))
    return errors


def dequantized(weight: Tensor, qparams: WeightQParams) -> Tensor:
    """The weight rounded to its format and scales, float32."""
    return fake_quantize(weight, by_name(qparams.format), qparams.scale[:, None])
