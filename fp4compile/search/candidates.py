"""What every method shares: min-max, and the output error that candidates are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fp4compile.blocks import outer_scale, quantize_blocks
from fp4compile.formats import FloatFormat, by_name
from fp4compile.numerics import power_of_two, scale_for_max
from fp4compile.operand import round_operand, spread, transformed
from fp4compile.qparams import ActivationQParams, SiteQParams, TensorSpec, WeightQParams
from fp4compile.search.outputs import SquaredOutputs
from fp4compile.search.problem import GroupProblem
from fp4compile.search.tokens import TINY, Tokens
from fp4compile.weights import ROWS, dequantized, for_activation, row_parts

# The format of min-max per width: the OCP element types (MX specification, section 5.3).
MINMAX_FORMATS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
ERROR_TOKENS = 1024

Decision = tuple[Mapping[str, WeightQParams], ActivationQParams | None]


def minmax_format(spec: TensorSpec) -> FloatFormat:
    """The first format that ``spec`` names, else the standard one of its width."""
    return by_name(spec.formats[0] if spec.formats else MINMAX_FORMATS[spec.bits])


def minmax_weight(weight: Tensor, spec: TensorSpec) -> WeightQParams:
    """Scales per row or per block that clip nothing."""
    fmt = minmax_format(spec)
    if spec.granularity == "block":
        return blocked_weight(weight, (fmt,), spec.block_size)
    return WeightQParams(fmt.name, scale_for_max(weight.abs().amax(dim=1), fmt))


def minmax_activation(absmax: Tensor, spec: TensorSpec) -> ActivationQParams:
    """No shift, nothing clipped. ``absmax`` ``[K]``."""
    fmt = minmax_format(spec)
    if spec.granularity == "block":
        outer = outer_scale(absmax.amax(), (fmt,))
        return ActivationQParams(fmt.name, "block", outer, block_size=spec.block_size)
    static = scale_for_max(absmax.amax(), fmt)
    scale = torch.ones(()) if spec.granularity == "token" else static
    return ActivationQParams(fmt.name, spec.granularity, scale)


def blocked_weight(
    weight: Tensor,
    formats: tuple[FloatFormat, ...],
    block_size: int,
    clips: tuple[float, ...] = (1.0,),
    channel_weight: Tensor | None = None,
) -> WeightQParams:
    """Block scales of ``weight`` ``[N, K]``; see ``quantize_blocks``."""
    outer = outer_scale(weight.abs().amax(), formats)
    name = "|".join(fmt.name for fmt in formats)
    parts = [
        quantize_blocks(part, outer, formats, block_size, clips, channel_weight)
        for part in weight.split(ROWS)
    ]
    codes = torch.cat([part.scale_codes for part in parts])
    return WeightQParams(name, outer[None], codes, block_size)


def minmax_decision(problem: GroupProblem) -> Decision:
    """Formats of :data:`MINMAX_FORMATS`; nothing is clipped, nothing searched."""
    weights = {
        name: problem.decided.get(name) or minmax_weight(weight, problem.spec.weight)
        for name, weight in problem.weights.items()
    }
    spec = problem.spec.activation
    return weights, None if spec is None else minmax_activation(problem.statistics.absmax, spec)


def apply_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """What the GEMM sees of ``x`` ``[T, K]``: transformed, rounded as by
    ``fp4::quantize_activation``, times its scale; float32.
    """
    shift = qparams.exponent_shift
    values = transformed(x, shift, qparams.rotation)
    steps, scale = round_operand(
        values,
        qparams.scale,
        qparams.format,
        qparams.granularity,
        qparams.block_size,
        qparams.block_clip,
    )
    rounded = steps * spread(scale, qparams.granularity, qparams.block_size, x.shape[-1])
    if shift is None or qparams.shift_in_weight:
        return rounded
    return rounded * power_of_two(shift)


def exact_operand(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """What :func:`apply_activation` gives of ``x`` ``[T, K]`` if nothing were rounded."""
    if qparams.exponent_shift is not None and not qparams.shift_in_weight:
        return x  # shifted there and back; such shifts go without rotation
    return transformed(x, qparams.exponent_shift, qparams.rotation)


def clipping_errors(tokens: Tokens, qparams: ActivationQParams | None) -> Tensor:
    """Mean squared error ``[K]`` of what ``qparams`` clips of unseen tokens, as the GEMM sees it;
    none where scales are dynamic.
    """
    if qparams is None or qparams.granularity != "tensor" or qparams.rotation > 1:
        return torch.zeros_like(tokens.absmax)
    factor = torch.ones(())
    if qparams.exponent_shift is not None:
        factor = power_of_two(qparams.exponent_shift)
    maximum = qparams.scale * by_name(qparams.format).max_integer
    errors = tokens.clipping_errors(maximum * factor)
    return errors / factor.square() if qparams.shift_in_weight else errors


def output_errors(
    problem: GroupProblem,
    tokens: Tokens,
    weights: Mapping[str, WeightQParams],
    activation: ActivationQParams | None,
) -> dict[str, float]:
    """Relative output error of every site with weights and activation quantized, on about 1000
    weighted tokens, with what must be expected of unseen ones.
    """
    return all_output_errors(problem, tokens, [(weights, activation)])[0]


def all_output_errors(
    problem: GroupProblem, tokens: Tokens, decisions: Sequence[Decision]
) -> list[dict[str, float]]:
    """:func:`output_errors` of several decisions."""
    some = tokens.thinned(ERROR_TOKENS)
    x = some.scaled(some.x)
    seen = [x if a is None else some.scaled(apply_activation(some.x, a)) for _, a in decisions]
    unseen = [clipping_errors(tokens, activation) * len(x) for _, activation in decisions]
    found: list[dict[str, float]] = [{} for _ in decisions]
    for name, weight in problem.weights.items():
        new = partial(SquaredOutputs, centred=name in problem.heads)
        power, on_seen, on_unseen = new(), [new() for _ in decisions], [new() for _ in decisions]
        parts = [row_parts(weight, weights[name]) for weights, _ in decisions]
        for of_decisions in zip(*parts, strict=True):
            rows = of_decisions[0][0]
            y = x @ rows.t()
            power.add(y)
            for index, (_, part) in enumerate(of_decisions):
                quantized = dequantized(for_activation(rows, decisions[index][1]), part)
                on_seen[index].add((seen[index] @ quantized.t()).sub_(y))
                on_unseen[index].add((quantized * unseen[index].sqrt()).t())
        for errors, *both in zip(found, on_seen, on_unseen, strict=True):
            errors[name] = sum(part.total for part in both) / max(power.total, TINY)
    return found


def accepted(
    problem: GroupProblem, held_out: Tokens, decisions: Sequence[Decision]
) -> dict[str, SiteQParams]:
    """The best of ``decisions`` on ``held_out``; min-max if that has less error.

    Decisions that share their activation are taken apart: every weight has its best.
    """
    decisions = [*decisions, minmax_decision(problem)]
    scored = all_output_errors(problem, held_out, decisions)
    base = scored[-1]
    best = min(
        (_best_weights(decisions, scored, activation) for _, activation in decisions),
        key=lambda found: sum(error for _, error in found[0].values()),
    )
    weights, activation = best
    return {
        name: SiteQParams(qparams, activation, error, base[name])
        for name, (qparams, error) in weights.items()
    }


def _best_weights(
    decisions: Sequence[Decision],
    scored: Sequence[Mapping[str, float]],
    activation: ActivationQParams | None,
) -> tuple[dict[str, tuple[WeightQParams, float]], ActivationQParams | None]:
    """(qparams, error) of least error for every weight among the decisions with ``activation``."""
    found: dict[str, tuple[WeightQParams, float]] = {}
    for (weights, own), errors in zip(decisions, scored, strict=True):
        if own is activation:
            for name, qparams in weights.items():
                if name not in found or errors[name] < found[name][1]:
                    found[name] = (qparams, errors[name])
    return found, activation
