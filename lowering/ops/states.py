"""fp4::quantize_states and fp4::dequantize_states in plain torch, fused with what stands around."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.lowering import inductor
from fp4compile.lowering.ops.codes import decode, encode
from fp4compile.ops.states import token_scale
from fp4compile.packing import pack, unpack


@inductor.register_as_aten(torch.ops.fp4.quantize_states.default)
def quantize_states(
    states: Tensor, channel_scale: Tensor | None, format: str
) -> tuple[Tensor, Tensor]:
    fmt = by_name(format)
    values = states.to(torch.float32)
    if channel_scale is not None:
        values = values * channel_scale.reciprocal()
    scale = token_scale(values, fmt.max_integer)
    codes = encode(values * scale.to(torch.float32).reciprocal(), fmt)
    return pack(codes, fmt.bits), scale


@inductor.register_as_aten(torch.ops.fp4.dequantize_states.default)
def dequantize_states(
    codes: Tensor,
    scale: Tensor,
    channel_scale: Tensor | None,
    format: str,
    channels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    fmt = by_name(format)
    values = decode(unpack(codes, fmt.bits, channels), fmt) * scale.to(torch.float32)
    if channel_scale is not None:
        values = values * channel_scale
    return values.to(out_dtype)
