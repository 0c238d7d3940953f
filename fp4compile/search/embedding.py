"""Format and scales of a weight that is looked up, and perhaps also a head's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.numerics import power_of_two
from fp4compile.qparams import TensorSpec, WeightQParams
from fp4compile.search.candidates import minmax_weight
from fp4compile.search.gptq import Compensation
from fp4compile.search.problem import SearchOptions
from fp4compile.search.tokens import TINY
from fp4compile.search.weight import OutputError, search_weight


def lookup_moment(weight: Tensor, held_shift: Tensor | None = None) -> Tensor:
    """``[K, K]`` such that ``d M d^T`` is the mean relative error of looked-up rows of ``weight``
    ``[N, K]`` that change by ``d``.

    Args:
        held_shift: the weight holds 2^shift for a head, which a look-up undoes.
    """
    rows, channels = weight.shape
    unit = torch.ones(channels) if held_shift is None else power_of_two(-held_shift)
    return torch.diag(unit.square()) / (weight * unit).square().sum().clamp_min(TINY) * rows


def tied_moment(
    weight: Tensor,
    head_moment: Tensor,
    options: SearchOptions,
    held_shift: Tensor | None = None,
) -> Tensor:
    """``[K, K]`` as :func:`lookup_moment`: the error of the head's output plus
    ``options.lookup_weight`` times that of looked-up rows.

    Args:
        head_moment: second moment ``[K, K]`` of the head's input.
    """
    # mean over rows of w H w^T
    power = (weight @ head_moment * weight).sum() / len(weight)
    lookup = lookup_moment(weight, held_shift)
    return options.lookup_weight * lookup + head_moment / power.clamp_min(TINY)


def search_embedding(
    weight: Tensor, spec: TensorSpec, head_moment: Tensor | None, options: SearchOptions
) -> WeightQParams:
    """Least relative error of the looked-up rows, plus that of the head's output if tied.

    Args:
        weight: float32 ``[N, K]``.
        head_moment: second moment ``[K, K]`` of the input of the head that shares the weight.
    """
    if head_moment is not None:
        return search_tied(weight, spec, head_moment, None, options)
    # Channels of a plain look-up do not mix: nothing could compensate.
    return search_weight(weight, OutputError.of_inputs(lookup_moment(weight)), spec.candidates)


def search_tied(
    weight: Tensor,
    spec: TensorSpec,
    head_moment: Tensor,
    held_shift: Tensor | None,
    options: SearchOptions,
) -> WeightQParams:
    """Least error by :func:`tied_moment`."""
    moment = tied_moment(weight, head_moment, options, held_shift)
    found = search_weight(weight, OutputError.of_inputs(moment), spec.candidates)
    if options.rounding == "nearest":
        return found
    return Compensation(moment).rescaled(weight, found)


def minmax_embedding(
    weight: Tensor, spec: TensorSpec, head_moment: Tensor | None, options: SearchOptions
) -> WeightQParams:
    """Scales that clip nothing, whatever reads the weight."""
    return minmax_weight(weight, spec)
