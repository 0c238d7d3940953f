"""``fp4::linear``: GEMM of an activation operand with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.blocks import per_channel
from fp4compile.formats import INT8_MAX, FloatFormat, by_name
from fp4compile.packing import unpack_blocks, unpack_values

FLOAT32_EXACT_INTEGERS = 2**24


def accumulator_dtype(operand: torch.dtype, fmt: FloatFormat, reduction: int) -> torch.dtype:
    """A float type in which the eager GEMM is exact on the integer route.

    The sums of K products of an int8 operand with integer weight values are integers. float32
    holds them exactly, in any order of summation, while the largest possible one is below 2^24.
    """
    if operand != torch.int8 or not fmt.fits_int8:
        return torch.float32
    largest_sum = reduction * INT8_MAX * fmt.max_integer
    return torch.float32 if largest_sum < FLOAT32_EXACT_INTEGERS else torch.float64


@torch.library.custom_op("fp4::linear", mutates_args=())
def linear(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Tensor | None = None,
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> Tensor:
    """``y[m, n] = (sum_k operand[m, k] * w[n, k]) * operand_scale[m] * weight_scale[n] + bias[n]``.

    Args:
        operand: ``[..., K]``. int8 or bfloat16 from ``quantize_activation``, or the unquantized
            activation (float32, bfloat16, float16) with ``operand_scale`` None (weight-only).
        operand_scale: float32, 0-d, ``[..., 1]``, ``[..., blocks]`` or None.
        packed_weight: uint8 ``[N, packed_size(K)]``, layout of ``packing.py``.
        weight_scale: float32 ``[N]``; ``[1]``, the outer scale, with block scales.
        bias: ``[N]``, any floating dtype, or None.
        weight_format: a name in ``formats.FORMATS``; with block scales also two, ``"e2m1|e1m2"``.
        out_dtype: dtype of the result.
        block_scale: uint8 ``[N, blocks]``, codes of ``blocks.py``, or None.
        block_size: channels per block of ``block_scale`` and of ``operand_scale``.
        operand_format: the format, a name in ``formats.FORMATS``, whose integer values
            ``operand`` holds; "" if unknown.
        operand_outer: float32 0-d. Every ``operand_scale`` of a block is this times an E4M3 number.
        operand_shift: int8 ``[K]``, exponents of the powers of two that the channels of
            ``operand`` were multiplied by after rounding; None for none.
        shift_block: that many neighbours from channel 0 on have the same ``operand_shift``.

    The last four change nothing in the result: they say what the operand is made of, so that
    hardware which multiplies such numbers natively can be given them.

    Returns:
        ``[..., N]`` in ``out_dtype``. Without blocks, with an int8 operand and a weight format
        that fits int8, the sum is exact (numerics: int32); then float32 products, first with
        ``operand_scale``, then with ``weight_scale``, then the bias, each rounded once. With
        blocks every block's exact sum is multiplied by both its scales; their sum is float32.
    """
    reduction = operand.shape[-1]
    if block_scale is not None:
        y = _block_sums(
            operand,
            operand_scale,
            packed_weight,
            weight_scale,
            weight_format,
            block_scale,
            block_size,
        )
    else:
        fmt = by_name(weight_format)
        exact = accumulator_dtype(operand.dtype, fmt, reduction)
        weight = unpack_values(packed_weight, fmt, reduction)
        y = torch.nn.functional.linear(operand.to(exact), weight.to(exact)).to(torch.float32)
        if operand_scale is not None:
            y = y * operand_scale
        y = y * weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def _block_sums(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    block_scale: Tensor,
    block_size: int,
) -> Tensor:
    """Scaled before the sum, which is then an ordinary float32 GEMM."""
    reduction = operand.shape[-1]
    weight = unpack_blocks(
        packed_weight, block_scale, weight_scale, weight_format, block_size, reduction
    )
    x = operand.to(torch.float32)
    if operand_scale is None:
        return torch.nn.functional.linear(x, weight)
    if operand_scale.dim() == operand.dim() and operand_scale.shape[-1] == block_scale.shape[-1]:
        x = x * per_channel(operand_scale, block_size, reduction)
        return torch.nn.functional.linear(x, weight)
    return torch.nn.functional.linear(x, weight) * operand_scale


@linear.register_fake
def _(
    operand: Tensor,
    operand_scale: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Tensor | None = None,
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Tensor | None = None,
    operand_shift: Tensor | None = None,
    shift_block: int = 0,
) -> Tensor:
    return operand.new_empty((*operand.shape[:-1], packed_weight.shape[0]), dtype=out_dtype)
