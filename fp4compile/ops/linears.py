"""``fp4::linears``: several weights times one operand, as one GEMM where a target can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4compile.ops.linear import linear


@torch.library.custom_op("fp4::linears", mutates_args=())
def linears(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_format: str,
    out_dtype: torch.dtype,
    block_scales: Sequence[Tensor],
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> list[Tensor]:
    """:func:`linear` of every weight: q, k and v; gate and up.

    Args:
        biases, block_scales: one per weight, or none at all. Everything else is as in ``linear``.

    Returns:
        ``[..., N]`` of each weight.
    """
    return [
        linear(
            operand,
            operand_scale,
            packed,
            scale,
            biases[i] if biases else None,
            weight_format,
            out_dtype,
            block_scales[i] if block_scales else None,
            block_size,
        )
        for i, (packed, scale) in enumerate(zip(packed_weights, weight_scales, strict=True))
    ]


@linears.register_fake
def _(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_format: str,
    out_dtype: torch.dtype,
    block_scales: Sequence[Tensor],
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> list[Tensor]:
    rows = operand.shape[:-1]
    return [operand.new_empty((*rows, len(p)), dtype=out_dtype) for p in packed_weights]
