"""Stacks of experts: one activation for all, and every expert's weight by its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4compile.formats import alternatives
from fp4compile.operand import transformed
from fp4compile.qparams import (
    ActivationQParams,
    QuantSpec,
    SiteQParams,
    TensorSpec,
    WeightQParams,
)
from fp4compile.search.candidates import all_output_errors, minmax_decision
from fp4compile.search.problem import GroupProblem
from fp4compile.search.tokens import weighted_tokens
from fp4compile.weights import for_activation, packed_codes

if TYPE_CHECKING:
    from fp4compile.search import SearchMethod

# Rows of all experts that activation and formats are chosen on.
SHARED_ROWS = 4096
# An expert with fewer tokens is searched on those of all experts.
FEWEST_TOKENS = 64


def search_experts(method: SearchMethod, problem: GroupProblem) -> dict[str, SiteQParams]:
    """Decide weights ``[E, N, K]`` that each serve the tokens routed to them.

    The activation is searched with ``method`` on the tokens and some rows of all experts; then
    every expert's weight, in the space which that decision fixed, on its own tokens. Experts that
    got no token are searched by their weights alone and named in ``SiteQParams.unreached``.

    Args:
        problem: the last column of ``statistics`` says which expert a token is for.
    """
    statistics, last = problem.statistics.last_column_taken()
    expert, problem = last.to(torch.int64), replace(problem, statistics=statistics)
    shared = _shared_decisions(method, problem)
    return {name: _decide(method, problem, name, expert, shared[name]) for name in problem.weights}


def _shared_decisions(method: SearchMethod, problem: GroupProblem) -> dict[str, SiteQParams]:
    """What the group is decided to if all experts were one weight: activation and formats."""
    flat = {name: weight.flatten(0, 1) for name, weight in problem.weights.items()}
    return dict(method.search_group(replace(problem, weights=flat).thinned(SHARED_ROWS)))


def _decide(
    method: SearchMethod, problem: GroupProblem, name: str, expert: Tensor, shared: SiteQParams
) -> SiteQParams:
    stack, x = problem.weights[name], problem.statistics.sample
    spec = _held_spec(problem.spec.weight, shared.weight)
    counts = torch.bincount(expert, minlength=len(stack)).tolist()
    found, errors = [], []
    for index, weight in enumerate(stack):
        own = x[expert == index]
        tokens = own if len(own) >= FEWEST_TOKENS or not len(own) else x
        found.append(_search_one(method, problem, weight, tokens, shared.activation, spec))
        errors.append(_errors(problem, weight, own, found[-1], shared.activation))
    return SiteQParams(
        _stacked(found, shared.weight.format),
        shared.activation,
        _mean([error for error, _ in errors], counts),
        _mean([minmax for _, minmax in errors], counts),
        tuple(index for index, count in enumerate(counts) if not count),
    )


def _held_spec(spec: TensorSpec, chosen: WeightQParams) -> TensorSpec:
    """``spec`` with the format and blocks that are the same for all experts."""
    formats = tuple(fmt.name for fmt in alternatives(chosen.format))
    granularity = "block" if chosen.block_size else spec.granularity
    return replace(spec, formats=formats, granularity=granularity, block_size=chosen.block_size)


def _search_one(
    method: SearchMethod,
    problem: GroupProblem,
    weight: Tensor,
    x: Tensor,
    activation: ActivationQParams | None,
    spec: TensorSpec,
) -> WeightQParams:
    """Qparams with codes of one expert's ``weight`` ``[N, K]`` that sees the tokens ``x``."""
    working = for_activation(weight, activation)
    if len(x):
        seen = _working_input(x, activation)
        own = replace(
            problem,
            weights={"": working},
            statistics=replace(problem.statistics, absmax=seen.abs().amax(dim=0), sample=seen),
            spec=QuantSpec(spec, None, None),
        )
        found = method.search_group(own)[""].weight
    else:
        found = method.search_lookup(working, spec, None, problem.options)
    return replace(found, packed=packed_codes(working, found))


def _working_input(x: Tensor, activation: ActivationQParams | None) -> Tensor:
    """``x`` in the space of the weight that is quantized."""
    if activation is None:
        return x
    shift = activation.exponent_shift if activation.shift_in_weight else None
    return transformed(x, shift, activation.rotation)


def _errors(
    problem: GroupProblem,
    weight: Tensor,
    x: Tensor,
    found: WeightQParams,
    activation: ActivationQParams | None,
) -> tuple[float, float]:
    """Relative output error of one expert, and that of min-max; 0 without tokens."""
    if not len(x):
        return 0.0, 0.0
    own = replace(problem, weights={"": weight}, statistics=replace(problem.statistics, sample=x))
    decisions = [({"": found}, activation), minmax_decision(own)]
    error, minmax = all_output_errors(own, weighted_tokens(own), decisions)
    return error[""], minmax[""]


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """Weighted by tokens."""
    total = sum(value * count for value, count in zip(values, counts, strict=True))
    return total / max(sum(counts), 1)


def _stacked(found: Sequence[WeightQParams], format: str) -> WeightQParams:
    # A weight whose blocks did not choose has the codes that it would have if they had.
    blocks = [part.block_scale for part in found if part.block_scale is not None]
    scale = torch.stack([part.scale for part in found])
    return WeightQParams(
        format,
        scale.unsqueeze(-1) if blocks else scale,
        torch.stack(blocks) if blocks else None,
        found[0].block_size,
        torch.stack([part.packed for part in found if part.packed is not None]),
    )
