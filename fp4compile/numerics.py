"""Quantize, dequantize and fake-quantize in plain torch: the reference for every kernel.

    value = scale * integer_value(code) * 2^exponent_shift

Rounding is to nearest, ties to the even code; magnitudes saturate; NaN becomes zero, since no
code can hold it. Codes keep the sign of a value that rounds to zero (as ``ml_dtypes`` does).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat

# Numbers of this size have no bits below one.
MAGIC = 1.5 * 2**23


@cache
def value_table(fmt: FloatFormat, device: torch.device) -> Tensor:
    """Integer value of every code, float32 ``[2^bits]``."""
    return torch.tensor(fmt.integer_values, dtype=torch.float32, device=device)


@cache
def _threshold_table(fmt: FloatFormat, device: torch.device) -> Tensor:
    return torch.tensor(fmt.thresholds, dtype=torch.float32, device=device)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exact for exponents in [-126, 127] (``exp2`` need not be)."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def steps_to_code(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes (uint8) of numbers given in steps of the format, i.e. already divided by the scale."""
    steps = torch.nan_to_num(steps.to(torch.float32), nan=0.0)
    thresholds = _threshold_table(fmt, steps.device)
    magnitude = torch.bucketize(steps.abs(), thresholds, right=True, out_int32=True)
    sign = torch.signbit(steps).to(torch.int32) << (fmt.bits - 1)
    return (magnitude | sign).to(torch.uint8)


def round_steps(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Round numbers in steps to the format's integer values, float32; equals decoding
    :func:`steps_to_code`, several times faster (no table look-up).
    """
    bound = float(fmt.max_integer)
    return round_finite(
        torch.nan_to_num(steps.to(torch.float32), nan=0.0, posinf=bound, neginf=-bound), fmt
    )


def round_finite(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """:func:`round_steps` of float32 numbers that are none of them NaN."""
    clipped = steps.clamp(-fmt.max_integer, fmt.max_integer)
    if fmt.mantissa_bits == 0:
        return _round_to_power_of_two(clipped)
    # Adding 1.5 * 2^23 quanta leaves float32 no bits below one quantum: the adder itself rounds
    # to nearest even, and the parity of the quotient is the parity of the code.
    if fmt.max_integer < 2 << fmt.mantissa_bits:
        return clipped.add(MAGIC).sub_(MAGIC)  # the quantum is 1 everywhere
    binade = (clipped.view(torch.int32) & 0x7F800000).view(torch.float32)
    magic = binade.mul_(MAGIC * 2.0**-fmt.mantissa_bits).clamp_(min=MAGIC)
    return clipped.add_(magic).sub_(magic)


def _round_to_power_of_two(steps: Tensor) -> Tensor:
    # Without mantissa bits the code's parity is the exponent's, so a tie goes up from an odd
    # exponent field: integer round-to-nearest-even of the float's bits at the exponent.
    magnitude = steps.abs()
    bits = magnitude.view(torch.int32)
    rounded = (bits >> 23).bitwise_and_(1).add_(bits).add_(0x3FFFFF).bitwise_and_(0x7F800000)
    small = (magnitude > 0.5).to(torch.float32)  # below the step: 0 or 1, tie to code 0
    return torch.where(magnitude < 1.0, small, rounded.view(torch.float32)).copysign_(steps)


def quantize(x: Tensor, fmt: FloatFormat, scale: Tensor) -> Tensor:
    """Codes (uint8, shape of ``x``) of ``x / scale``; ``scale`` is float32 and broadcasts."""
    return steps_to_code(x.to(torch.float32) * scale.reciprocal(), fmt)


def dequantize(codes: Tensor, fmt: FloatFormat, scale: Tensor) -> Tensor:
    """``scale * integer_value(code)`` in float32."""
    return decode(codes, fmt) * scale


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """Integer value of every code, float32."""
    return value_table(fmt, codes.device)[codes.to(torch.int64)]


def fake_quantize(x: Tensor, fmt: FloatFormat, scale: Tensor) -> Tensor:
    """``dequantize(quantize(x))`` in float32, without materialising codes."""
    return round_steps(x.to(torch.float32) * scale.reciprocal(), fmt) * scale


def hadamard(x: Tensor, size: int) -> Tensor:
    """Multiply every ``size`` neighbours of the last dimension by the orthonormal Hadamard matrix
    of that size (a power of two dividing the dimension); its own inverse. float32.

    Butterflies from the widest to the narrowest, then one multiplication: kernels that do the same
    get the same bits.
    """
    y = x.to(torch.float32).unflatten(-1, (-1, size))
    half = size // 2
    while half:
        pair = y.unflatten(-1, (-1, 2, half))
        left, right = pair.unbind(-2)
        y = torch.stack((left + right, left - right), dim=-2).flatten(-3)
        half //= 2
    return (y * size**-0.5).flatten(-2)


def scale_for_max(maximum: Tensor, fmt: FloatFormat) -> Tensor:
    """Scale that maps ``maximum`` to the largest magnitude; 1 where the maximum is 0."""
    scale = maximum.to(torch.float32) / fmt.max_integer
    # A subnormal scale has no finite reciprocal.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
