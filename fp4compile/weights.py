"""From a weight's qparams to its codes and to what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.blocks import block_scales, in_second_format, per_channel
from fp4compile.formats import alternatives, by_name
from fp4compile.numerics import fake_quantize, quantize, steps_to_code
from fp4compile.operand import working_weight
from fp4compile.packing import pack, unpack_blocks, unpack_values
from fp4compile.qparams import ActivationQParams, WeightQParams

# Rows are independent: so many at a time bound the memory of what is done with a large weight.
ROWS = 8192


def row_parts(
    weight: Tensor, qparams: WeightQParams, size: int = ROWS
) -> Iterator[tuple[Tensor, WeightQParams]]:
    """``weight`` ``[N, K]`` and its qparams, ``size`` rows at a time."""
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield (
            weight[rows],
            replace(
                qparams,
                # The outer scale of blocks is one for all rows.
                scale=qparams.scale[rows] if qparams.block_scale is None else qparams.scale,
                block_scale=None if qparams.block_scale is None else qparams.block_scale[rows],
                packed=None if qparams.packed is None else qparams.packed[rows],
            ),
        )


def for_activation(weight: Tensor, activation: ActivationQParams | None) -> Tensor:
    """The weight ``[N, K]`` that is quantized: transformed as ``activation`` needs it."""
    if activation is None:
        return weight
    return working_weight(
        weight, activation.exponent_shift, activation.shift_in_weight, activation.rotation
    )


def channel_scales(qparams: WeightQParams, channels: int) -> Tensor:
    """The scale of every value, to broadcast with ``[N, K]``."""
    if qparams.block_scale is None:
        return qparams.scale[:, None]
    return per_channel(
        block_scales(qparams.block_scale, qparams.scale), qparams.block_size, channels
    )


def steps_to_packed(steps: Tensor, qparams: WeightQParams) -> Tensor:
    """Packed codes of ``steps`` ``[N, K]``, numbers already divided by their scales."""
    first, *second = alternatives(qparams.format)
    codes = steps_to_code(steps, first)
    if second and qparams.block_scale is not None:
        flag = per_channel(
            in_second_format(qparams.block_scale), qparams.block_size, steps.shape[1]
        )
        codes = torch.where(flag, steps_to_code(steps, second[0]), codes)
    return pack(codes, first.bits)


def packed_codes(weight: Tensor, qparams: WeightQParams) -> Tensor:
    """uint8 ``[N, packed_size(K)]``: the codes in ``qparams``, else ``weight`` rounded to nearest.

    Args:
        weight: float32 ``[N, K]``, as :func:`for_activation` gives it.
    """
    if qparams.packed is not None:
        return qparams.packed
    if qparams.block_scale is None:
        fmt = by_name(qparams.format)
        return pack(quantize(weight, fmt, qparams.scale[:, None]), fmt.bits)
    steps = weight * channel_scales(qparams, weight.shape[1]).reciprocal()
    return steps_to_packed(steps, qparams)


def dequantized(weight: Tensor, qparams: WeightQParams) -> Tensor:
    """What the codes of ``weight`` mean, float32 ``[N, K]``, in the space of ``weight``."""
    if qparams.packed is None and qparams.block_scale is None:
        return fake_quantize(weight, by_name(qparams.format), qparams.scale[:, None])
    packed, channels = packed_codes(weight, qparams), weight.shape[1]
    if qparams.block_scale is None:
        return unpack_values(packed, by_name(qparams.format), channels) * qparams.scale[:, None]
    return unpack_blocks(
        packed,
        qparams.block_scale,
        qparams.scale,
        qparams.format,
        qparams.block_size,
        channels,
    )
