"""Block scales: neighbours along K share an E4M3 scale, whose free sign bit names their format.

Two levels, as in NVFP4: a block's scale is ``outer * e4m3(code & 127)`` with one float32 ``outer``
per tensor. E4M3 scales have no sign, so bit 7 says which of two alternative formats the block's
codes are in: a block without an outlier is better served by the uniform E1M2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.formats import FloatFormat
from fp4compile.numerics import round_steps, scale_for_max

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
SECOND_FORMAT = 128


@dataclass(frozen=True)
class QuantizedBlocks:
    """``steps`` float32 ``[..., K]``, integer values; ``scale_codes`` uint8 ``[..., blocks]``."""

    steps: Tensor
    scale_codes: Tensor


def block_count(channels: int, block_size: int) -> int:
    """Blocks of a row; the last one may be shorter."""
    return -(-channels // block_size)


def outer_scale(absmax: Tensor, formats: Sequence[FloatFormat]) -> Tensor:
    """The float32 scale with which a block of maximum ``absmax`` gets the largest E4M3 scale."""
    narrowest = min(formats, key=lambda fmt: fmt.max_integer)
    return scale_for_max(absmax / E4M3_MAX, narrowest)


def block_scales(scale_codes: Tensor, outer: Tensor) -> Tensor:
    """float32 scale of every block, shape of ``scale_codes``."""
    e4m3 = (scale_codes & 127).view(torch.float8_e4m3fn)
    return e4m3.to(torch.float32) * outer


def rescaled_blocks(scale_codes: Tensor, factor: Tensor) -> Tensor:
    """Codes of the nearest scales to ``factor`` times those of ``scale_codes``; formats stay."""
    ratio = block_scales(scale_codes, torch.ones(())) * factor
    return _encode(ratio) | (scale_codes & SECOND_FORMAT)


def in_second_format(scale_codes: Tensor) -> Tensor:
    """Whether a block's codes are in the second of the alternative formats."""
    return scale_codes >= SECOND_FORMAT


def per_channel(values: Tensor, block_size: int, channels: int) -> Tensor:
    """One value per block ``[..., blocks]`` to one per channel ``[..., channels]``."""
    return values.repeat_interleave(block_size, dim=-1)[..., :channels]


def quantize_blocks(
    x: Tensor,
    outer: Tensor,
    formats: Sequence[FloatFormat],
    block_size: int,
    clips: Sequence[float] = (1.0,),
    channel_weight: Tensor | None = None,
) -> QuantizedBlocks:
    """Round ``x`` ``[..., K]``, each block in the format and with the maximum of least error.

    Args:
        outer: float32, 0-d.
        block_size: a power of two.
        clips: maxima to try, as factors of the block's absolute maximum; the first of equally
            good ones wins, formats in the outer loop.
        channel_weight: ``[K]``, how much a channel's squared error counts; all the same if None.
    """
    channels = x.shape[-1]
    blocks = _in_blocks(torch.nan_to_num(x.to(torch.float32), nan=0.0), block_size)
    weight = None if channel_weight is None else _in_blocks(channel_weight, block_size)
    absmax = blocks.abs().amax(dim=-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None  # error, steps, scale codes
    for flag, fmt in enumerate(formats):
        for clip in clips:
            codes = _encode(absmax * (clip / fmt.max_integer) * outer.reciprocal())
            scale = block_scales(codes, outer)
            # Infinity times zero is no number.
            inverse = scale.reciprocal().clamp(max=torch.finfo(torch.float32).max)
            steps = round_steps(blocks * inverse, fmt)
            square = (steps * scale - blocks).square()
            error = _tree_sum(square if weight is None else square * weight)
            codes = codes + SECOND_FORMAT * flag
            if best is None:
                best = (error, steps, codes)
            else:
                better = error < best[0]
                candidate = (error, steps, codes)
                best = tuple(map(lambda new, old: torch.where(better, new, old), candidate, best))  # type: ignore[assignment]
    assert best is not None
    return QuantizedBlocks(best[1].flatten(-2)[..., :channels], best[2].squeeze(-1))


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def _encode(ratio: Tensor) -> Tensor:
    """E4M3 code of a positive ratio, at least the smallest and at most the largest scale."""
    return ratio.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _tree_sum(x: Tensor) -> Tensor:
    """Sum of the last dimension (a power of two) by halves: an order that kernels can keep."""
    while x.shape[-1] > 1:
        left, right = x.chunk(2, dim=-1)
        x = left + right
    return x
