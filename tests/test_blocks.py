"""Block scales, rotation, and the transforms between them."""

from __future__ import annotations

import pytest
import torch

from fp4compile import ops
from fp4compile.blocks import (
    E4M3_MIN,
    block_count,
    block_scales,
    in_second_format,
    outer_scale,
    per_channel,
    quantize_blocks,
    rescaled_blocks,
)
from fp4compile.formats import FORMATS, by_name
from fp4compile.numerics import hadamard, round_steps
from fp4compile.operand import original_weight, transformed, working_weight
from fp4compile.packing import unpack_blocks
from fp4compile.search.candidates import blocked_weight
from fp4compile.weights import dequantized, packed_codes

E2M1, E1M2 = by_name("e2m1"), by_name("e1m2")
BOTH = (E2M1, E1M2)


def test_every_scale_code_is_its_e4m3_value_whatever_the_format_flag():
    codes = torch.arange(1, 127, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).to(torch.float32)
    outer = torch.tensor(0.37)
    assert torch.equal(block_scales(codes, outer), values * outer)
    assert torch.equal(block_scales(codes | 128, outer), values * outer)
    assert not in_second_format(codes).any()
    assert in_second_format(codes | 128).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("channels", [1, 16, 40, 64])
def test_blocks_round_to_the_nearest_at_their_scale(fmt, channels):
    x = torch.randn(5, channels) * torch.rand(5, 1) * 10
    outer = outer_scale(x.abs().amax(), (fmt,))
    got = quantize_blocks(x, outer, (fmt,), 16)
    assert got.scale_codes.shape == (5, block_count(channels, 16))
    scale = per_channel(block_scales(got.scale_codes, outer), 16, channels)
    assert torch.equal(got.steps, round_steps(x * scale.reciprocal(), fmt))
    # E4M3 rounds the scale by at most 1/16, so that is what a block's maximum may be clipped by.
    clipped = scale * fmt.max_integer
    assert bool((x.abs() <= clipped * (1 + 1 / 15) + outer * E4M3_MIN).all())


def test_a_block_takes_the_format_and_maximum_of_least_error():
    x = torch.randn(64, 64)
    outer = outer_scale(x.abs().amax(), BOTH)
    clips = (1.0, 0.85)

    def errors(formats, clips):
        found = quantize_blocks(x, outer, formats, 32, clips)
        scale = per_channel(block_scales(found.scale_codes, outer), 32, 64)
        return (found.steps * scale - x).square().view(64, 2, 32).sum(-1)

    single = torch.stack([errors((fmt,), (clip,)) for fmt in BOTH for clip in clips])
    assert torch.allclose(errors(BOTH, clips), single.min(dim=0).values)


def test_zero_and_non_finite_blocks_stay_finite():
    x = torch.zeros(3, 32)
    x[1, 0], x[2, 3] = float("nan"), float("inf")
    got = quantize_blocks(x, torch.tensor(1.0), BOTH, 32, (1.0, 0.85))
    assert bool(torch.isfinite(got.steps).all())
    assert not got.steps[0].any()
    assert not got.steps[1].any()
    assert got.steps[2, 3] > 0


def test_rescaled_blocks_are_exact_within_e4m3_and_keep_the_format():
    codes = torch.randint(40, 80, (6, 4), dtype=torch.uint8)
    codes[:3] |= 128
    one = torch.ones(())
    halved = rescaled_blocks(codes, torch.tensor(0.5))
    assert torch.equal(block_scales(halved, one), block_scales(codes, one) / 2)
    assert torch.equal(in_second_format(halved), in_second_format(codes))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_hadamard_is_orthonormal_symmetric_and_its_own_inverse(size):
    matrix = hadamard(torch.eye(size), size).to(torch.float64)
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-6)
    x = torch.randn(3, 2 * size)
    expected = (x.view(3, 2, size).to(torch.float64) @ matrix).view(3, -1)
    assert torch.allclose(hadamard(x, size).to(torch.float64), expected, atol=1e-5)


@pytest.mark.parametrize("rotation", [1, 8])
@pytest.mark.parametrize("in_weight", [False, True])
def test_transforms_leave_the_product(rotation, in_weight):
    x, weight = torch.randn(7, 24), torch.randn(5, 24)
    shift = torch.randint(-3, 4, (24,), dtype=torch.int8) if in_weight else None
    working = working_weight(weight, shift, in_weight, rotation)
    y = transformed(x, shift, rotation) @ working.t()
    assert torch.allclose(y, x @ weight.t(), atol=1e-4)
    assert torch.allclose(original_weight(working, shift, in_weight, rotation), weight, atol=1e-5)


@pytest.mark.parametrize("formats", [(E2M1,), BOTH], ids=len)
@pytest.mark.parametrize("channels", [32, 40, 96])
def test_linear_with_blocks_is_the_product_of_what_the_codes_mean(formats, channels):
    weight, x = torch.randn(9, channels), torch.randn(2, 4, channels)
    qparams = blocked_weight(weight, formats, 32, (1.0, 0.85))
    packed = packed_codes(weight, qparams)
    means = unpack_blocks(packed, qparams.block_scale, qparams.scale, qparams.format, 32, channels)
    assert torch.equal(dequantized(weight, qparams), means)
    outer = outer_scale(x.abs().amax(), formats)
    operand, scale = ops.quantize_activation(
        x, outer, None, qparams.format, "block", block_size=32, block_clip=0.85
    )
    assert operand.dtype == torch.int8
    got = ops.linear(
        operand, scale, packed, qparams.scale, None, qparams.format, torch.float32,
        qparams.block_scale, 32,
    )  # fmt: skip
    x_hat = operand.to(torch.float64) * per_channel(scale, 32, channels)
    expected = x_hat @ means.to(torch.float64).t()
    assert torch.allclose(got.to(torch.float64), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotation", [1, 8])
def test_embedding_undoes_what_the_weight_holds_for_its_head(rotation):
    weight = torch.randn(20, 32)
    shift = torch.randint(-3, 4, (32,), dtype=torch.int8)
    working = working_weight(weight, shift, True, rotation)
    qparams = blocked_weight(working, BOTH, 32)
    rows = torch.tensor([[3, 7], [0, 19]])
    got = ops.embedding(
        rows, packed_codes(working, qparams), qparams.scale, qparams.format, 32, torch.float32,
        qparams.block_scale, 32, shift, rotation,
    )  # fmt: skip
    expected = original_weight(dequantized(working, qparams)[rows], shift, True, rotation)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "block", "block_size": 16, "block_clip": 0.85, "rotation": 8},
        {"granularity": "token", "rotation": 8},
        {"granularity": "tensor", "shift_in_weight": True},
    ],
    ids=str,
)
def test_schema_and_fake_of_the_activation_transforms(arguments):
    shift = torch.randint(-2, 3, (40,), dtype=torch.int8)
    options = {"shift_in_weight": True, **arguments}
    torch.library.opcheck(
        torch.ops.fp4.quantize_activation.default,
        (torch.randn(2, 3, 40), torch.tensor(0.9), shift, "e2m1"),
        options,
    )
