"""Rotation and block scales as GPUs compute them, in plain torch, against the eager ones."""

from __future__ import annotations

import pytest
import torch

from fp4compile import blocks
from fp4compile.formats import alternatives
from fp4compile.lowering.ops.quantize_blocks import quantize_blocks, rotated
from fp4compile.numerics import hadamard


@pytest.mark.parametrize("size", [2, 32, 128])
def test_rotation(size: int) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x, size), hadamard(x, size))


@pytest.mark.parametrize("format", ["e2m1", "e2m1|e1m2", "e3m2"])
@pytest.mark.parametrize("clips", [(1.0,), (1.0, 0.85)])
def test_blocks(format: str, clips: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Blocks of all magnitudes, a short one, one of zeros.
    x = torch.randn(64, 70, generator=generator) * 2.0 ** torch.arange(-32, 32)[:, None]
    x[7] = 0
    outer, formats = torch.tensor(0.01), alternatives(format)
    steps, scale = quantize_blocks(x, outer, formats, 32, clips)
    expected = blocks.quantize_blocks(x, outer, formats, 32, clips)
    wanted = blocks.block_scales(expected.scale_codes, outer)
    # Sums of errors in another order may prefer the other of two as good.
    same = scale == wanted
    assert same.float().mean() > 0.99
    matches = blocks.per_channel(same, 32, 70)
    assert torch.equal(steps[matches], expected.steps[matches])
