"""``fp4::embedding``: rows of a packed weight, dequantized."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.operand import original_weight
from fp4compile.packing import unpack_blocks, unpack_values


@torch.library.custom_op("fp4::embedding", mutates_args=())
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
    """Look up ``indices`` (int, any shape) in a packed ``[N, packed_size(K)]`` weight.

    Args:
        weight_scale, block_scale, block_size: as in ``fp4::linear``.
        exponent_shift: int8 ``[K]`` that the weight holds for a tied head, or None.
        rotation: size of the Hadamard rotation that the weight holds for a tied head.

    Returns:
        ``[*indices.shape, embedding_dim]`` in ``out_dtype``: integer values times the float32
        scale of the row or block, rounded once to float32; the transform for the head undone in
        float32; rounded once to ``out_dtype``.
    """
    packed = packed_weight[indices]
    if block_scale is None:
        rows = unpack_values(packed, by_name(weight_format), embedding_dim)
        rows = rows * weight_scale[indices].unsqueeze(-1)
    else:
        rows = unpack_blocks(
            packed, block_scale[indices], weight_scale, weight_format, block_size, embedding_dim
        )
    return original_weight(rows, exponent_shift, True, rotation).to(out_dtype)


@embedding.register_fake
def _(
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
    return packed_weight.new_empty((*indices.shape, embedding_dim), dtype=out_dtype)
