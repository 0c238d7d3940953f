"""``fp4::quantize_activation``: activations to the operand of the low-bit GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.blocks import block_count
from fp4compile.errors import SpecError
from fp4compile.formats import alternatives
from fp4compile.numerics import power_of_two
from fp4compile.operand import ordered, round_operand, transformed

GRANULARITIES = ("tensor", "token", "block")


def operand_dtype(format: str) -> torch.dtype:
    """int8 where all integer values fit (exact int32 sums), else bfloat16 (exact products)."""
    fits = all(fmt.fits_int8 for fmt in alternatives(format))
    return torch.int8 if fits else torch.bfloat16


def as_operand(
    values: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_in_weight: bool,
    block_size: int = 0,
    block_clip: float = 1.0,
    token_maximum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(operand, operand scale) of transformed ``values``: the op without its transform."""
    steps, operand_scale = round_operand(
        values, scale, format, granularity, block_size, block_clip, token_maximum
    )
    if exponent_shift is not None and not shift_in_weight:
        steps = steps * power_of_two(exponent_shift)
    # As the fake kernel says, whatever the strides of x.
    return steps.to(operand_dtype(format)).contiguous(), operand_scale


@torch.library.custom_op("fp4::quantize_activation", mutates_args=())
def quantize_activation(
    x: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_folded: bool = False,
    shift_in_weight: bool = False,
    rotation: int = 1,
    block_size: int = 0,
    block_clip: float = 1.0,
    channel_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` so that ``H_rotation(x * 2^-shift) ~ operand * operand_scale``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        scale: float32, 0-d. Granularity ``"tensor"``: the static scale. ``"token"``: the clip
            ratio; each token's clipping maximum is its absolute maximum times the ratio.
            ``"block"``: the outer scale of the E4M3 block scales (``blocks.py``).
        exponent_shift: int8 ``[K]``, the per-channel exponent bias of LLM-FP4 (section 3.3), or
            None.
        format: a name in ``formats.FORMATS``; for blocks also two, ``"e2m1|e1m2"``.
        granularity: ``"tensor"`` (static), ``"token"`` or ``"block"`` (both dynamic).
        shift_folded: the producer of ``x`` already multiplied channel k by 2^-exponent_shift[k].
        shift_in_weight: the weight holds ``2^shift``; else the operand is shifted back (then
            shifts are in ``[0, max_shift]`` and there is no rotation).
        rotation: size of the Hadamard matrix that multiplies neighbouring channels; 1 for none.
        block_size: channels that share a block scale, a power of two.
        block_clip: second maximum that a block may take, as a factor of its own; 1 for none.
        channel_order: int32, the channels of the operand; K stands for zeros. ``exponent_shift`` is
            that of the operand's channels. None for the channels as they are.

    Returns:
        ``operand`` ``[..., K]``: integer values (``<< exponent_shift``), int8 or bfloat16
        (:func:`operand_dtype`); ``operand_scale`` float32: 0-d, ``[..., 1]`` or ``[..., blocks]``.

    Raises:
        UnknownFormatError, SpecError: no such format or granularity.
    """
    if granularity not in GRANULARITIES:
        raise SpecError(f"activation granularity {granularity!r} is not one of {GRANULARITIES}")
    if channel_order is not None:
        x = ordered(x, channel_order)
    values = transformed(x, exponent_shift, rotation, shift_folded)
    return as_operand(
        values,
        scale,
        exponent_shift,
        format,
        granularity,
        shift_in_weight,
        block_size,
        block_clip,
    )


@quantize_activation.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_folded: bool = False,
    shift_in_weight: bool = False,
    rotation: int = 1,
    block_size: int = 0,
    block_clip: float = 1.0,
    channel_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1] if channel_order is None else channel_order.shape[0]
    operand = x.new_empty((*x.shape[:-1], channels), dtype=operand_dtype(format))
    scale_shape: tuple[int | torch.SymInt, ...] = ()
    if granularity == "token":
        scale_shape = (*x.shape[:-1], 1)
    elif granularity == "block":
        scale_shape = (*x.shape[:-1], block_count(channels, block_size))
    return operand, x.new_empty(scale_shape, dtype=torch.float32)
