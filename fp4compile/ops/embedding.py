"""``fp4::embedding``: rows of a packed weight, dequantized."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.packing import unpack_values


@torch.library.custom_op("fp4::embedding", mutates_args=())
def embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    embedding_dim: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Look up ``indices`` (int, any shape) in a packed ``[N, packed_size(K)]`` weight.

    Returns:
        ``[*indices.shape, embedding_dim]`` in ``out_dtype``: integer values times the float32
        ``weight_scale[N]`` of the row, rounded once to float32 and once to ``out_dtype``.
    """
    rows = unpack_values(packed_weight[indices], by_name(weight_format), embedding_dim)
    return (rows * weight_scale[indices].unsqueeze(-1)).to(out_dtype)


@embedding.register_fake
def _(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    embedding_dim: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return packed_weight.new_empty((*indices.shape, embedding_dim), dtype=out_dtype)
