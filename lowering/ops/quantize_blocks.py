"""Rotation and block scales of an activation in functional torch, which Inductor makes a few fused
kernels of on a GPU; on CPUs a kernel of our own does it in one pass.

Sums are the same but for their order, so a value halfway between two codes may take the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.blocks import E4M3_MAX, E4M3_MIN
from fp4compile.formats import FloatFormat, by_name
from fp4compile.lowering.ops.rounding import round_steps

E4M3 = by_name("e4m3")


def rotated(values: Tensor, size: int) -> Tensor:
    """As ``numerics.hadamard``, by one product with its matrix."""
    index = torch.arange(size, device=values.device)
    # Entry (i, j) is negative where i and j have an odd number of bits in common.
    parity = index[:, None] & index[None, :]
    for half in (32, 16, 8, 4, 2, 1):
        parity = parity ^ (parity >> half)
    matrix = (1 - 2 * (parity & 1)).to(torch.float32) * size**-0.5
    return (values.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def quantize_blocks(
    values: Tensor,
    outer: Tensor,
    formats: Sequence[FloatFormat],
    block_size: int,
    clips: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Steps ``[..., K]`` and their scales ``[..., blocks]``, as ``blocks.quantize_blocks``."""
    channels = values.shape[-1]
    values = torch.where(values != values, 0.0, values)
    blocks = F.pad(values, (0, -channels % block_size)).unflatten(-1, (-1, block_size))
    absmax = blocks.abs().amax(dim=-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for fmt in formats:
        for clip in clips:
            scale = _to_e4m3(absmax * (clip / fmt.max_integer) * outer.reciprocal()) * outer
            inverse = scale.reciprocal().clamp(max=torch.finfo(torch.float32).max)
            steps = round_steps(blocks * inverse, fmt)
            error = (steps * scale - blocks).square().sum(dim=-1, keepdim=True)
            if best is None:
                best = (error, steps, scale)
                continue
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, steps, best[1]),
                torch.where(better, scale, best[2]),
            )
    assert best is not None
    return best[1].flatten(-2)[..., :channels], best[2].squeeze(-1)


def _to_e4m3(ratio: Tensor) -> Tensor:
    """The nearest scale; in float32, as GPUs before sm_89 have no 8-bit floats."""
    step = E4M3.default_step
    return round_steps(ratio.clamp(E4M3_MIN, E4M3_MAX) / step, E4M3) * step
