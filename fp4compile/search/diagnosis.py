"""What of a decision's error is the weight's and what the activation's, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fp4compile.numerics import power_of_two
from fp4compile.operand import transformed
from fp4compile.qparams import Diagnosis, SiteQParams
from fp4compile.search.candidates import apply_activation, clipping_errors
from fp4compile.search.problem import GroupProblem
from fp4compile.search.tokens import TINY, Tokens, weighted_tokens
from fp4compile.weights import dequantized, for_activation, row_parts

# Fewer than the errors that decide: a share of an error needs less certainty than a choice.
DIAGNOSIS_TOKENS = 128


def diagnosed(
    problem: GroupProblem, decisions: Mapping[str, SiteQParams]
) -> dict[str, SiteQParams]:
    """``decisions`` with their diagnosis."""
    sample = problem.statistics.sample
    few = sample[:: max(1, len(sample) // DIAGNOSIS_TOKENS)]
    tokens = weighted_tokens(replace(problem, statistics=replace(problem.statistics, sample=few)))
    absmax = problem.statistics.absmax
    return {
        name: replace(
            site, diagnosis=Diagnosis(absmax, *_parts(problem.weights[name], site, tokens))
        )
        for name, site in decisions.items()
    }


def _parts(weight: Tensor, site: SiteQParams, tokens: Tokens) -> tuple[float, float]:
    """Relative output error of the weight ``[N, K]`` alone, and of the activation alone."""
    x = tokens.scaled(tokens.x)
    exact, rounded = _operands(site, tokens)
    unseen = clipping_errors(tokens, site.activation) * len(x)
    power = of_weight = of_activation = 0.0
    for rows, qparams in row_parts(weight, site.weight):
        y = x @ rows.t()
        working = for_activation(rows, site.activation)
        power += float(y.square().sum())
        of_weight += float((exact @ dequantized(working, qparams).t() - y).square().sum())
        of_activation += float((rounded @ working.t() - y).square().sum())
        of_activation += float(unseen @ working.square().sum(dim=0))
    return of_weight / max(power, TINY), of_activation / max(power, TINY)


def _operands(site: SiteQParams, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The GEMM's operand ``[T, K]``, not rounded and rounded."""
    activation = site.activation
    if activation is None:
        x = tokens.scaled(tokens.x)
        return x, x
    exact = transformed(tokens.x, activation.exponent_shift, activation.rotation)
    if activation.exponent_shift is not None and not activation.shift_in_weight:
        exact = exact * power_of_two(activation.exponent_shift)
    return tokens.scaled(exact), tokens.scaled(apply_activation(tokens.x, activation))
