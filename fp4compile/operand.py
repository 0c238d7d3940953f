"""From an activation to the operand of the low-bit GEMM: transform, scale, round.

    x' = H_rotation(x * 2^-shift),   x' ~ steps * operand_scale

The weight of the GEMM carries the inverse where the transform does not cancel by itself: see
:func:`working_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.blocks import block_scales, per_channel, quantize_blocks
from fp4compile.formats import alternatives
from fp4compile.numerics import hadamard, power_of_two, round_steps, scale_for_max

# Channels that share a power of two where hardware multiplies by those of blocks (OCP MX).
SHIFT_BLOCK = 32


def ordered(x: Tensor, channel_order: Tensor) -> Tensor:
    """Channels ``[..., K]`` as ``channel_order`` lists them; K stands for zeros."""
    return F.pad(x, (0, 1))[..., channel_order]


def unordered(x: Tensor, channel_order: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`ordered`."""
    # Each channel is listed once, before what pads: sorted, its place comes at its own number.
    return x[..., channel_order.argsort()[:channels]]


def transformed(
    x: Tensor, exponent_shift: Tensor | None, rotation: int = 1, shift_folded: bool = False
) -> Tensor:
    """``H_rotation(x * 2^-shift)``, float32; ``shift_folded``: x comes already shifted."""
    values = x.to(torch.float32)
    if exponent_shift is not None and not shift_folded:
        values = values * power_of_two(-exponent_shift)
    return hadamard(values, rotation) if rotation > 1 else values


def working_weight(
    weight: Tensor, exponent_shift: Tensor | None, shift_in_weight: bool, rotation: int = 1
) -> Tensor:
    """The weight ``[N, K]`` whose product with the transformed activation is ``x W^T``."""
    if shift_in_weight and exponent_shift is not None:
        weight = weight * power_of_two(exponent_shift)
    return hadamard(weight, rotation) if rotation > 1 else weight


def original_weight(
    weight: Tensor, exponent_shift: Tensor | None, shift_in_weight: bool, rotation: int = 1
) -> Tensor:
    """The inverse of :func:`working_weight`."""
    if rotation > 1:
        weight = hadamard(weight, rotation)
    if shift_in_weight and exponent_shift is not None:
        weight = weight * power_of_two(-exponent_shift)
    return weight


def round_operand(
    values: Tensor,
    scale: Tensor,
    format: str,
    granularity: str,
    block_size: int = 0,
    block_clip: float = 1.0,
    token_maximum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(steps, operand scale) of transformed ``values`` ``[..., K]``; see
    ``fp4::quantize_activation``. ``token_maximum`` ``[..., 1]``: the absolute maxima, where
    ``values`` has not all channels of its tokens.
    """
    formats = alternatives(format)
    if granularity == "block":
        clips = (1.0,) if block_clip == 1.0 else (1.0, block_clip)
        quantized = quantize_blocks(values, scale, formats, block_size, clips)
        return quantized.steps, block_scales(quantized.scale_codes, scale)
    if granularity == "token":
        if token_maximum is None:
            token_maximum = values.abs().amax(dim=-1, keepdim=True)
        scale = scale_for_max(token_maximum * scale, formats[0])
    else:
        scale = scale.clone()
    return round_steps(values * scale.reciprocal(), formats[0]), scale


def spread(operand_scale: Tensor, granularity: str, block_size: int, channels: int) -> Tensor:
    """The operand scale in a shape that broadcasts with the operand."""
    if granularity != "block":
        return operand_scale
    return per_channel(operand_scale, block_size, channels)


def largest_rotation(channels: int, limit: int) -> int:
    """Size of the largest Hadamard rotation of ``channels`` channels, at most ``limit``."""
    return min(channels & -channels, limit)
