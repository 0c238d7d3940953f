"""Exponent shifts that move from the activation into the weight (LLM-FP4's pre-shifted bias)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.numerics import power_of_two
from fp4compile.operand import transformed
from fp4compile.search.problem import GroupProblem
from fp4compile.search.ties import tied_sums
from fp4compile.search.tokens import TINY, Tokens

LARGEST_SHIFT = 20


def balancing_shift(problem: GroupProblem, tokens: Tokens) -> Tensor:
    """int8 ``[K]``: log2 of the channel factors that minimise the product of activation and
    weight power, ``sqrt(rms(x_k) / |W_k|)`` (cf. SmoothQuant, arXiv 2211.10438), about their mean.
    """
    rms = tokens.scaled(tokens.x).square().sum(dim=0).sqrt()
    norm = torch.zeros_like(rms)
    for weight in problem.weights.values():
        norm += weight.square().sum(dim=0)
    used = (rms > 0) & (norm > 0)
    return _centred((_log2(rms) - _log2(norm.sqrt())) / 2, used, problem.channel_ties)


def equalizing_shift(problem: GroupProblem, tokens: Tokens) -> Tensor:
    """int8 ``[K]``: log2 of the channel maxima about their mean, which all become alike."""
    return _centred(_log2(tokens.absmax), tokens.absmax > 0, problem.channel_ties)


def _log2(x: Tensor) -> Tensor:
    return x.clamp_min(TINY).log2()


def _centred(log: Tensor, used: Tensor, ties: Tensor | None) -> Tensor:
    """``log`` about its mean over channels in use, tied ones at theirs."""
    log = torch.where(used, log - log[used].mean(), torch.zeros(()))
    log = tied_sums(log, ties) / tied_sums(used.to(log.dtype), ties).clamp_min(1)
    return log.round().clamp(-LARGEST_SHIFT, LARGEST_SHIFT).to(torch.int8)


def moved(problem: GroupProblem, tokens: Tokens, shift: Tensor) -> tuple[GroupProblem, Tokens]:
    """The problem of activations ``x * 2^-shift`` and weights ``w * 2^shift``, and its tokens."""
    factor = power_of_two(shift)
    weights = {name: weight * factor for name, weight in problem.weights.items()}
    tokens = replace(tokens, x=tokens.x / factor, absmax=tokens.absmax / factor)
    return replace(problem, weights=weights), tokens


def transformed_moment(moment: Tensor, shift: Tensor | None, rotation: int = 1) -> Tensor:
    """Second moment of the transformed activation, from that of the activation."""
    half = transformed(moment, shift, rotation)
    return transformed(half.t(), shift, rotation)
