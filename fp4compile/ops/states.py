"""``fp4::quantize_states``, ``fp4::dequantize_states``: keys and values of attention as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.numerics import quantize
from fp4compile.packing import pack, packed_size, unpack_values


@torch.library.custom_op("fp4::quantize_states", mutates_args=())
def quantize_states(
    states: Tensor, channel_scale: Tensor | None, format: str
) -> tuple[Tensor, Tensor]:
    """Round ``states / channel_scale``, each token of each head by its own maximum.

    Args:
        states: ``[..., L, D]``, float32, bfloat16 or float16.
        channel_scale: float32, broadcasts with ``states``, or None.
        format: a name in ``formats.FORMATS``.

    Returns:
        codes, uint8 ``[..., L, packed_size(D)]``, and scales, bfloat16 ``[..., L, 1]``.
    """
    fmt = by_name(format)
    # Contiguous: bucketize would copy, and say so.
    values = states.to(torch.float32).contiguous()
    if channel_scale is not None:
        values = values * channel_scale.reciprocal()
    scale = token_scale(values, fmt.max_integer)
    codes = pack(quantize(values, fmt, scale.to(torch.float32)), fmt.bits)
    return codes.contiguous(), scale


def token_scale(values: Tensor, max_integer: int) -> Tensor:
    """bfloat16 ``[..., 1]``: the scale that brings each row's maximum to ``max_integer``."""
    scale = (values.abs().amax(dim=-1, keepdim=True) / max_integer).to(torch.bfloat16)
    # A subnormal scale has no finite reciprocal.
    return torch.where(scale > torch.finfo(torch.bfloat16).tiny, scale, torch.ones_like(scale))


@quantize_states.register_fake
def _(states: Tensor, channel_scale: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    size = packed_size(states.shape[-1], by_name(format).bits)
    return (
        states.new_empty((*states.shape[:-1], size), dtype=torch.uint8),
        states.new_empty((*states.shape[:-1], 1), dtype=torch.bfloat16),
    )


@torch.library.custom_op("fp4::dequantize_states", mutates_args=())
def dequantize_states(
    codes: Tensor,
    scale: Tensor,
    channel_scale: Tensor | None,
    format: str,
    channels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """What :func:`quantize_states` stored: ``integer_value(code) * scale * channel_scale``.

    Args:
        channels: D, which ``codes`` are padded from.

    Returns:
        ``[..., L, D]`` in ``out_dtype``; the products are float32.
    """
    values = unpack_values(codes, by_name(format), channels) * scale.to(torch.float32)
    if channel_scale is not None:
        values = values * channel_scale
    return values.to(out_dtype)


@dequantize_states.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    channel_scale: Tensor | None,
    format: str,
    channels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], channels), dtype=out_dtype)
