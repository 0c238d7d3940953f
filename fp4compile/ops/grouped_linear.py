"""``fp4::grouped_linear``: rows of an activation operand, each with the weight of its expert."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.ops.linear import linear


@torch.library.custom_op("fp4::grouped_linear", mutates_args=())
def grouped_linear(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Tensor | None = None,
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> Tensor:
    """``fp4::linear`` of rows ``offsets[e - 1]`` to ``offsets[e]`` with the e-th weight.

    Args:
        operand: ``[S, K]``, rows in the order of their experts.
        operand_scale: float32, 0-d, ``[S, 1]``, ``[S, blocks]`` or None.
        packed_weight: uint8 ``[E, N, packed_size(K)]``.
        weight_scale: float32 ``[E, N]``; ``[E, 1, 1]``, outer scales, with block scales.
        offsets: int32 or int64 ``[E]``, not falling.
        block_scale: uint8 ``[E, N, blocks]`` or None.
        weight_format, out_dtype, block_size, operand_format, operand_outer, operand_shift,
            shift_block: as in ``fp4::linear``.

    Returns:
        ``[S, N]`` in ``out_dtype``; rows beyond ``offsets[-1]`` are zero.
    """
    y = operand.new_zeros((operand.shape[0], packed_weight.shape[1]), dtype=out_dtype)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = linear(
                operand[start:end],
                _rows_of(operand_scale, start, end),
                packed_weight[expert],
                weight_scale[expert].flatten(),
                None,
                weight_format,
                out_dtype,
                None if block_scale is None else block_scale[expert],
                block_size,
            )
        start = end
    return y


def _rows_of(scale: Tensor | None, start: int, end: int) -> Tensor | None:
    return scale[start:end] if scale is not None and scale.dim() else scale


@grouped_linear.register_fake
def _(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Tensor | None = None,
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> Tensor:
    return operand.new_empty((operand.shape[0], packed_weight.shape[1]), dtype=out_dtype)
