"""fp4::embedding in plain torch: the looked-up bytes are decoded as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.blocks import in_second_format, per_channel
from fp4compile.formats import alternatives
from fp4compile.lowering import inductor
from fp4compile.lowering.ops.codes import decode
from fp4compile.numerics import power_of_two
from fp4compile.operand import original_weight
from fp4compile.packing import unpack


@inductor.register_as_aten(torch.ops.fp4.embedding.default)
def embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    embedding_dim: int,
    out_dtype: torch.dtype,
    block_scale: Tensor | None = None,
    block_size: int = 0,
    exponent_shift: Tensor | None = None,
    rotation: int = 1,
) -> Tensor:
    first, *second = alternatives(weight_format)
    codes = unpack(packed_weight[indices], first.bits, embedding_dim)
    rows = decode(codes, first)
    if block_scale is None:
        rows = rows * weight_scale[indices].unsqueeze(-1)
    else:
        scale_codes = block_scale[indices]
        if second:
            flag = per_channel(in_second_format(scale_codes), block_size, embedding_dim)
            rows = torch.where(flag, decode(codes, second[0]), rows)
        scales = _decode_e4m3(scale_codes & 127) * weight_scale
        rows = rows * per_channel(scales, block_size, embedding_dim)
    return original_weight(rows, exponent_shift, True, rotation).to(out_dtype)


def _decode_e4m3(codes: Tensor) -> Tensor:
    """As ``blocks.block_scales``: reinterpreting a byte as float8 is no pointwise operation."""
    exponent, mantissa = (codes >> 3).to(torch.int32), (codes & 7).to(torch.int32)
    normal = power_of_two(exponent - 7) * (1 + mantissa.to(torch.float32) / 8)
    return torch.where(exponent == 0, mantissa.to(torch.float32) * 2.0**-9, normal)
