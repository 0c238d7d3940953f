"""Exponent shifts by coordinate descent on the layer's output error.

The table of per-channel errors ignores that errors of different channels meet in the same output.
Here channels change their shift one at a time when that lowers the error of the output itself,
with weights and activation quantized.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.numerics import fake_quantize
from fp4compile.qparams import ActivationQParams

SWEEPS = 2


def refine_shifts(
    candidate: ActivationQParams,
    x: Tensor,
    root_weight: Tensor,
    weight: Tensor,
    quantized_weight: Tensor,
    largest_shift: int,
) -> ActivationQParams:
    """``candidate`` (static) with shifts that lower ``|x_hat w_hat^T - x w^T|^2``.

    Args:
        x: tokens ``[T, K]``, of which token t counts ``root_weight[t]^2``.
        weight, quantized_weight: ``[N, K]``, the group's stacked weights.
    """
    fmt = by_name(candidate.format)
    if largest_shift == 0:
        return candidate
    # rounded[t] is x as every channel would be with shift t; rows carry their token's weight.
    rounded = torch.stack(
        [
            fake_quantize(x, fmt, candidate.scale * 2.0**t) * root_weight[:, None]
            for t in range(largest_shift + 1)
        ]
    )
    channels = x.shape[1]
    shift = candidate.exponent_shift
    shift = torch.zeros(channels, dtype=torch.int64) if shift is None else shift.to(torch.int64)
    x_hat = rounded.gather(0, shift.expand(1, len(x), -1))[0]
    gram = quantized_weight.t() @ quantized_weight
    slope = x_hat @ gram - (x * root_weight[:, None]) @ (weight.t() @ quantized_weight)
    for _ in range(SWEEPS):
        changed = False
        for k in range(channels):
            steps = rounded[:, :, k] - x_hat[:, k]
            gain = 2 * steps @ slope[:, k] + gram[k, k] * steps.square().sum(dim=1)
            best = int(gain.argmin())
            if gain[best] < 0 and best != shift[k]:
                slope.addr_(steps[best], gram[k])
                x_hat[:, k] = rounded[best, :, k]
                shift[k] = best
                changed = True
        if not changed:
            break
    found = shift.to(torch.int8) if bool(shift.any()) else None
    return replace(candidate, exponent_shift=found)
