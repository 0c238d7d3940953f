"""fp4::embedding in plain torch: the looked-up bytes are decoded as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat, by_name
from fp4compile.lowering import inductor
from fp4compile.packing import unpack


@inductor.register_as_aten(torch.ops.fp4.embedding.default)
def embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    embedding_dim: int,
    out_dtype: torch.dtype,
) -> Tensor:
    fmt = by_name(weight_format)
    codes = unpack(packed_weight[indices], fmt.bits, embedding_dim)
    return (_decode(codes, fmt) * weight_scale[indices].unsqueeze(-1)).to(out_dtype)


def _decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """Integer values by arithmetic: a table would be a second gather per value."""
    half = 2 ** (fmt.bits - 1)
    magnitude = codes.to(torch.int32) & (half - 1)
    exponent = magnitude >> fmt.mantissa_bits
    mantissa = magnitude & (2**fmt.mantissa_bits - 1)
    normal = (mantissa + 2**fmt.mantissa_bits) << (exponent - 1).clamp(min=0)
    value = torch.where(exponent == 0, mantissa, normal).clamp(max=fmt.max_integer)
    return torch.where(codes >= half, -value, value).to(torch.float32)
