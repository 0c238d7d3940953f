"""Weights for inputs that rounding has made noisy.

A quantized activation is modelled, channel by channel, as ``x_hat = g x + n`` with noise ``n`` that
is independent of the inputs. The weight of least output error is then not the given one: where
channels are correlated, it can average noise out (Wiener's filter). Rounding that weight by
``E[x_hat x_hat^T]`` minimises the error of the rounded layer, weight and activation together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.qparams import ActivationQParams
from fp4compile.search.candidates import apply_activation, exact_operand
from fp4compile.search.tokens import TINY, Tokens

# Of the mean diagonal: channels without signal or noise have no say, and must not be singular.
RIDGE = 1e-6
# Tokens rounded at a time: what one step leaves in the cache, the next finds there.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class NoisyInputs:
    """``moment`` ``[K, K]`` is ``E[x_hat x_hat^T]``; ``transfer`` ``[K, K]`` makes of a weight the
    best one for ``x_hat``, None where inputs are exact.
    """

    moment: Tensor
    transfer: Tensor | None

    def best_weight(self, weight: Tensor) -> Tensor:
        """For rows ``[N, K]``: the v of least ``E |v x_hat - w x|^2``."""
        return weight if self.transfer is None else weight @ self.transfer


def noisy_inputs(
    tokens: Tokens, moment: Tensor, activation: ActivationQParams | None
) -> NoisyInputs:
    """How ``activation`` rounds ``tokens``; ``moment`` ``[K, K]`` is that of the exact operand."""
    if activation is None:
        return NoisyInputs(moment, None)
    gain, noise = _gain_and_noise(tokens, activation)
    cross = moment * gain  # E[x x_hat^T]
    seen = gain[:, None] * cross + torch.diag(noise)
    exact = seen.to(torch.float64)
    exact.diagonal().add_(RIDGE * exact.diagonal().mean().clamp_min(TINY))
    transfer = torch.linalg.solve(exact, cross.t().to(torch.float64)).t()
    return NoisyInputs(seen, transfer.to(torch.float32))


def _gain_and_noise(tokens: Tokens, activation: ActivationQParams) -> tuple[Tensor, Tensor]:
    """``[K]`` each: of every channel the gain, and the noise's power in the moment's units."""
    power, cross, seen = torch.zeros(3, tokens.x.shape[1])
    for start in range(0, len(tokens.x), TOKENS_AT_ONCE):
        some = tokens[slice(start, start + TOKENS_AT_ONCE)]
        x = some.for_moments(exact_operand(some.x, activation))
        x_hat = some.for_moments(apply_activation(some.x, activation))
        power += x.square().sum(dim=0)
        cross += (x * x_hat).sum(dim=0)
        seen += x_hat.square_().sum(dim=0)
    gain = torch.where(power > 0, cross / power.clamp_min(TINY), torch.ones(()))
    return gain, (seen - gain.square() * power).clamp_min(0)
