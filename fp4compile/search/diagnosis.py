"""What of a decision's error is the weight's and what the activation's, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fp4compile.qparams import Diagnosis, SiteQParams
from fp4compile.search.candidates import apply_activation, clipping_errors, exact_operand
from fp4compile.search.outputs import SquaredOutputs
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
    order = sample.square().sum(dim=1).argsort(stable=True)
    step = max(1, len(sample) // DIAGNOSIS_TOKENS)
    few = sample[order[step // 2 :: step]]
    statistics = replace(problem.statistics, sample=few, sensitivity=None)
    tokens = weighted_tokens(replace(problem, statistics=statistics))
    absmax = problem.statistics.absmax
    found = {}
    for name, site in decisions.items():
        centred = name in problem.heads
        parts = _parts(problem.weights[name], site, tokens, centred=centred)
        found[name] = replace(site, diagnosis=Diagnosis(absmax, *parts))
    return found


def _parts(
    weight: Tensor, site: SiteQParams, tokens: Tokens, *, centred: bool
) -> tuple[float, float]:
    """Relative output error of the weight ``[N, K]`` alone, and of the activation alone."""
    x = tokens.scaled(tokens.x)
    exact, rounded = _operands(site, tokens)
    unseen = (clipping_errors(tokens, site.activation) * len(x)).sqrt()
    power, of_weight, of_seen, of_unseen = (SquaredOutputs(centred=centred) for _ in range(4))
    for rows, qparams in row_parts(weight, site.weight):
        y = x @ rows.t()
        working = for_activation(rows, site.activation)
        power.add(y)
        of_weight.add((exact @ dequantized(working, qparams).t()).sub_(y))
        of_seen.add((rounded @ working.t()).sub_(y))
        of_unseen.add((working * unseen).t())
    total = max(power.total, TINY)
    return of_weight.total / total, (of_seen.total + of_unseen.total) / total


def _operands(site: SiteQParams, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The GEMM's operand ``[T, K]``, not rounded and rounded."""
    activation = site.activation
    if activation is None:
        x = tokens.scaled(tokens.x)
        return x, x
    exact, rounded = (f(tokens.x, activation) for f in (exact_operand, apply_activation))
    return tokens.scaled(exact), tokens.scaled(rounded)
