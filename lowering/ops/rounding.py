"""Scales and rounding in functional torch, which Inductor fuses with what is around them."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat

FLOAT32_EXPONENT = 0x7F800000
# Binades with a coarser step, up to which comparing with each is faster than looking at bits.
MAX_COMPARED = 3


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded to nearest: Triton's own division is not, but that of addcdiv is."""
    return torch.addcdiv(torch.zeros_like(b), a, b)


def scale_for_max(maximum: Tensor, fmt: FloatFormat) -> Tensor:
    """As ``numerics.scale_for_max``."""
    scale = divide(maximum, torch.full_like(maximum, fmt.max_integer))
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def round_steps(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """As ``numerics.round_steps``, which saves memory by mutating what it made."""
    bound = float(fmt.max_integer)
    # clamp keeps NaN; no code holds it, so it becomes 0. C++ calls isnan for every lane.
    clipped = torch.where(steps != steps, 0.0, steps.clamp(-bound, bound))
    if fmt.mantissa_bits == 0:
        return _round_to_power_of_two(clipped)
    # float32 has no bits below one quantum here, so the adder rounds to nearest even.
    magic = _quantum(clipped, fmt) * (1.5 * 2**23)
    return (clipped + magic) - magic


def _quantum(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Distance of neighbours in the binade of ``steps``."""
    coarse = [2.0**e for e in range(fmt.mantissa_bits + 1, 128) if 2**e <= fmt.max_integer]
    if len(coarse) <= MAX_COMPARED:
        # C++ casts the bits of every lane by itself.
        magnitude = steps.abs()
        quantum = torch.ones_like(steps)
        for number, start in enumerate(coarse):
            quantum = torch.where(magnitude >= start, 2.0 ** (number + 1), quantum)
        return quantum
    binade = (steps.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    return (binade * 2.0**-fmt.mantissa_bits).clamp(min=1.0)


def _round_to_power_of_two(steps: Tensor) -> Tensor:
    magnitude = steps.abs()
    bits = magnitude.view(torch.int32)
    rounded = ((bits + 0x3FFFFF + ((bits >> 23) & 1)) & FLOAT32_EXPONENT).view(torch.float32)
    value = torch.where(magnitude < 1.0, (magnitude > 0.5).to(torch.float32), rounded)
    return torch.where(steps < 0, -value, value)
