"""FPQ: joint search of formats, clipping and exponent shifts (LLM-FP4, sections 3.2 and 3.3).

Weights and activations are searched in turn, each given the other, by the error of the layer
output with both quantized. A token's error counts less the more its output power exceeds the mean:
else the few tokens with massive activations (attention sinks) would decide alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fp4compile.errors import SpecError
from fp4compile.formats import FloatFormat, by_name
from fp4compile.qparams import ActivationQParams, SiteQParams, TensorSpec, WeightQParams
from fp4compile.search.activation import ActivationError, search_activation, widest_shift
from fp4compile.search.balance import balancing_shift, equalizing_shift, moved
from fp4compile.search.best import transformed_decision
from fp4compile.search.candidates import (
    Decision,
    accepted,
    apply_activation,
    minmax_decision,
    output_errors,
)
from fp4compile.search.embedding import search_tied
from fp4compile.search.gptq import Compensation
from fp4compile.search.noise import NoisyInputs, noisy_inputs
from fp4compile.search.problem import GroupProblem
from fp4compile.search.tokens import Tokens, mean_powers, split, weighted_tokens
from fp4compile.search.weight import OutputError, search_weight

OBJECTIVE_TOKENS = 1024
PROMISE_ROWS = 128
PROMISE = 1.2
# Between 4-bit activations and weights nothing is gained by moving shifts.
COARSE_BITS = 4
# The scales of a row are few choices; moments of so many tokens decide them as well as all.
MOMENT_TOKENS = 2048
# Another round of weights and activations follows only what was worth it: the second gains a
# percent or two of the error, the third seldom any.
WORTHWHILE = 0.99


def minmax(problem: GroupProblem) -> dict[str, SiteQParams]:
    """The standard formats; nothing is clipped, nothing searched."""
    weights, activation = minmax_decision(problem)
    errors = output_errors(problem, weighted_tokens(problem), weights, activation)
    return {
        name: SiteQParams(weights[name], activation, error, error) for name, error in errors.items()
    }


def fpq_baseline(problem: GroupProblem) -> dict[str, SiteQParams]:
    """FPQ without exponent shifts, rounding to nearest (the "FPQ baseline" of the paper)."""
    spec, options = problem.spec, replace(problem.options, rounding="nearest")
    if spec.activation is not None:
        spec = replace(spec, activation=replace(spec.activation, exponent_shift=False))
    return fpq(replace(problem, spec=spec, options=options))


def fpq(problem: GroupProblem) -> dict[str, SiteQParams]:
    """The full search. What does not beat min-max on held-out tokens is not accepted."""
    _check(problem)
    train, held_out = split(weighted_tokens(problem))
    decisions = _decisions(problem, train, None)
    if _has_bits_to_spare(problem):
        shift = _promising_shift(problem, train, decisions[0])
        if shift is not None:
            decisions += _moved_decisions(problem, train, shift)
    if problem.options.rotate and problem.spec.activation is not None and not problem.decided:
        decisions.append(transformed_decision(problem, train))
    return accepted(problem, held_out, decisions)


def _has_bits_to_spare(problem: GroupProblem) -> bool:
    """Whether activations are so fine that powers of two may move from them into the weights."""
    activation = problem.spec.activation
    return (
        activation is not None
        and activation.exponent_shift
        and activation.bits > COARSE_BITS
        and problem.options.balance
        and not problem.decided
    )


def _promising_shift(problem: GroupProblem, tokens: Tokens, unmoved: Decision) -> Tensor | None:
    """The shift that is worth a search in the weights: on some tokens and rows its error is at
    most :data:`PROMISE` times that of ``unmoved``.
    """
    few = tokens.thinned(OBJECTIVE_TOKENS)
    some = problem.thinned(PROMISE_ROWS)
    powers = mean_powers(some, few)
    plain = _search_weights(some, OutputError.of_inputs(few.moment()), None, unmoved[0])
    least = sum(output_errors(some, few, plain, unmoved[1]).values())
    least, best = PROMISE * least, None
    for shift in _movable_shifts(problem, tokens, ActivationError.of(some, plain, powers)):
        shifted, shifted_tokens = moved(some, few, shift)
        objective = OutputError.of_inputs(shifted_tokens.moment())
        # Moved shifts widen the range of a row, so another format may suit it.
        weights = _search_weights(shifted, objective, problem.spec.weight.candidates)
        spec = _without_shifts(problem.spec.activation)
        activation = _search_activation(shifted, shifted_tokens, weights, powers, spec)
        error = sum(output_errors(shifted, shifted_tokens, weights, activation).values())
        if error < least:
            least, best = error, shift
    return best


def _movable_shifts(
    problem: GroupProblem, tokens: Tokens, objective: ActivationError
) -> Iterator[Tensor]:
    """Shifts to try in the weights."""
    assert problem.spec.activation is not None
    yield balancing_shift(problem, tokens)
    yield equalizing_shift(problem, tokens)
    widest = widest_shift(tokens, objective, problem.spec.activation)
    if widest is not None:
        yield widest


def _without_shifts(spec: TensorSpec | None) -> TensorSpec:
    assert spec is not None
    return replace(spec, exponent_shift=False)


def _moved_decisions(problem: GroupProblem, tokens: Tokens, shift: Tensor) -> list[Decision]:
    """With ``shift`` moved into the weights."""
    spec = replace(problem.spec, activation=_without_shifts(problem.spec.activation))
    problem = replace(problem, spec=spec, options=replace(problem.options, rounds=1))
    found = _decisions(*moved(problem, tokens, shift), shift)
    activation = found[0][1]  # the same for all
    assert activation is not None
    held = replace(activation, exponent_shift=shift, shift_in_weight=True)
    return [(weights, held) for weights, _ in found]


def _decisions(problem: GroupProblem, tokens: Tokens, moved_by: Tensor | None) -> list[Decision]:
    """What alternating finds, rounded to nearest and compensated; ``moved_by`` is the shift that
    the problem's weights already hold.
    """
    moment = tokens.moment()
    tied = {
        name: search_tied(
            problem.weights[name], problem.spec.weight, moment, moved_by, problem.options
        )
        for name in problem.tied - problem.decided.keys()
    }
    problem = replace(problem, decided={**problem.decided, **tied})
    weights, activation = _alternate(problem, tokens, OutputError.of_inputs(moment))
    if problem.options.rounding == "nearest" or problem.decided.keys() >= problem.weights.keys():
        return [(weights, activation)]
    noisy = noisy_inputs(tokens, moment, activation)
    return [(weights, activation), (_compensated(problem, noisy, weights), activation)]


def _check(problem: GroupProblem) -> None:
    for spec in (problem.spec.weight, problem.spec.activation):
        if spec is not None and spec.granularity == "block":
            raise SpecError(
                "method 'fpq' has one scale per output channel and per tensor or token, the spec "
                "asks for block scales; use method='best' or 'minmax'"
            )


def _alternate(problem: GroupProblem, tokens: Tokens, objective: OutputError) -> Decision:
    spec = problem.spec
    weights = _search_weights(problem, objective, spec.weight.candidates)
    if spec.activation is None:
        return weights, None
    powers = mean_powers(problem, tokens.thinned(OBJECTIVE_TOKENS))
    activation = _search_activation(problem, tokens, weights, powers, spec.activation)
    least = sum(output_errors(problem, tokens, weights, activation).values())
    best = weights, activation
    for _ in range(problem.options.rounds - 1):
        weights = _search_weights(problem, _seen_as(tokens, activation), None, weights)
        activation = _search_activation(problem, tokens, weights, powers, spec.activation)
        error = sum(output_errors(problem, tokens, weights, activation).values())
        if error < least:
            best = weights, activation
        if error > WORTHWHILE * least:
            break
        least = error
    return best


def _seen_as(tokens: Tokens, activation: ActivationQParams) -> OutputError:
    """The error of weights that are multiplied with what ``activation`` makes of the tokens."""
    some = tokens.thinned(MOMENT_TOKENS)
    x_hat = some.for_moments(apply_activation(some.x, activation))
    return OutputError.of_samples(x_hat, some.for_moments(some.x))


def _compensated(
    problem: GroupProblem, inputs: NoisyInputs, weights: Mapping[str, WeightQParams]
) -> dict[str, WeightQParams]:
    """The same formats with error-compensated rounding of what is best for ``inputs``; weights
    decided before stay.
    """
    compensation = Compensation(inputs.moment)
    return {
        name: qparams
        if name in problem.decided
        else compensation.rescaled(inputs.best_weight(problem.weights[name]), qparams)
        for name, qparams in weights.items()
    }


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
    problem: GroupProblem,
    tokens: Tokens,
    weights: Mapping[str, WeightQParams],
    powers: Mapping[str, Tensor],
    spec: TensorSpec,
) -> ActivationQParams:
    objective = ActivationError.of(problem, weights, powers)
    return search_activation(tokens, objective, spec, problem.options)
