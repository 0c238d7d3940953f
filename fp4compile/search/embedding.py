"""Format and scales of a weight that is looked up, and perhaps also a head's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.qparams import TensorSpec, WeightQParams
from fp4compile.search.weight import MINMAX_FORMATS, OutputError, minmax_weight, search_weight


def search_embedding(
    weight: Tensor, spec: TensorSpec, head_moment: Tensor | None = None
) -> WeightQParams:
    """Least relative error of the looked-up rows, plus that of the head's output if tied.

    Args:
        weight: float32 ``[N, K]``.
        head_moment: second moment ``[K, K]`` of the input of the head that shares the weight.
    """
    channels = weight.shape[1]
    objective = torch.eye(channels) / weight.square().mean().clamp_min(1e-30) / channels
    if head_moment is not None:
        # mean over rows of w H w^T
        power = (weight @ head_moment * weight).sum() / weight.shape[0]
        objective = objective + head_moment / power.clamp_min(1e-30)
    return search_weight(weight, OutputError.of_inputs(objective), spec.candidates)


def minmax_embedding(
    weight: Tensor, spec: TensorSpec, head_moment: Tensor | None = None
) -> WeightQParams:
    """Scales that clip nothing, whatever reads the weight."""
    return minmax_weight(weight, by_name(MINMAX_FORMATS[spec.bits]))
