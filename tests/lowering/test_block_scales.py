"""Compiled fp4::linear with block scales against the float64 product of what the codes mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile import lowering
from fp4compile.blocks import SECOND_FORMAT, block_count, per_channel
from fp4compile.kernels import REFERENCE
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.targets import CppTarget
from fp4compile.packing import pack, unpack_blocks
from fp4compile.tensor import FP4Tensor

Make = Callable[..., Any]

linear = torch.ops.fp4.linear
# Below, at and above every tile and every switch between kernels.
ROWS = (3, 1, 2, 4, 5, 33, 400)


@dataclass
class Blocks:
    """A random weight ``[N, K]`` with a scale, and perhaps a format, per block."""

    K: int
    size: int
    format: str
    packed: Tensor
    codes: Tensor
    outer: Tensor

    @staticmethod
    def random(N: int, K: int, size: int, format: str, scales: range = range(1, 127)) -> Blocks:
        shape = (N, block_count(K, size))
        codes = torch.tensor(scales, dtype=torch.uint8)[torch.randint(len(scales), shape)]
        if "|" in format:
            codes |= SECOND_FORMAT * torch.randint(0, 2, shape, dtype=torch.uint8)
        packed = pack(torch.randint(0, 16, (N, K), dtype=torch.uint8), 4)
        return Blocks(K, size, format, packed, codes, torch.tensor([0.25]))

    def linear(self, operand: Tensor, scale: Tensor | None, bias: Tensor | None = None) -> Tensor:
        return linear(
            operand, scale, self.packed, self.outer, bias, self.format, torch.float32,
            self.codes, self.size,
        )  # fmt: skip

    def check(self, y: Tensor, operand: Tensor, scale: Tensor | None) -> None:
        """``y`` is the product, to a few float32 roundings of its largest terms."""
        x = operand.to(torch.float64)
        if scale is not None:
            blocks = scale.dim() == 2 and scale.shape[-1] == self.codes.shape[-1]
            x = x * (per_channel(scale, self.size, self.K) if blocks else scale)
        weight = unpack_blocks(
            self.packed, self.codes, self.outer, self.format, self.size, self.K
        ).to(torch.float64)
        error = (y - x @ weight.t()).abs()
        assert bool((error <= 1e-6 * (x.abs() @ weight.abs().t())).all())


def skip_if_declined(target: CppTarget) -> None:
    for choice in SEEN:
        if choice.target != target.name:
            pytest.skip(choice.reason)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_sums_are_exact(compiled: Make, int8_operand: Make, target: CppTarget, size: int) -> None:
    # Scales of 1, 2 and 4 leave integers that float32 holds, so nothing is ever rounded.
    weight = Blocks.random(70, 400, size, "e2m1|e1m2", range(0x38, 0x49, 8))
    bias = torch.arange(70).to(torch.bfloat16)
    fast = compiled(lambda operand, scale: weight.linear(operand, scale, bias))
    for M in ROWS:
        operand = int8_operand(M, 400)
        scale = 2.0 ** torch.randint(-1, 2, (M, weight.codes.shape[-1]))
        y = fast(operand, scale)
        skip_if_declined(target)
        assert torch.equal(y, weight.linear(operand, scale, bias))


def test_bfloat16_operand_with_scales(compiled: Make, target: CppTarget) -> None:
    weight = Blocks.random(40, 160, 32, "e2m1|e1m2")
    operand, scale = torch.randint(-448, 449, (7, 160)).to(torch.bfloat16), torch.rand(7, 5)
    y = compiled(weight.linear)(operand, scale)
    skip_if_declined(target)
    weight.check(y, operand, scale)


def test_fused_epilogue(
    compiled: Make, int8_operand: Make, fusions: Make, target: CppTarget
) -> None:
    weight = Blocks.random(70, 64, 32, "e2m1|e1m2")

    def run(operand: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        return F.silu(weight.linear(operand, scale)) + residual

    fused = fusions()
    arguments = int8_operand(2, 5, 64), torch.rand(2, 5, 2) * 1e-5, torch.randn(2, 5, 70)
    fast = compiled(run)(*arguments)
    skip_if_declined(target)
    torch.testing.assert_close(fast, run(*arguments))
    assert fusions() > fused


@pytest.mark.parametrize("activation", ["e2m1|e1m2", None])
@pytest.mark.parametrize("K", [32, 96])
def test_kernel_for_tells_what_compiling_chooses(
    compiled: Make, K: int, activation: str | None
) -> None:
    codes = Blocks.random(8, K, 32, "e2m1|e1m2")
    weight = FP4Tensor(
        codes.packed,
        codes.outer,
        None if activation is None else torch.tensor(0.01),
        None,
        codes.codes,
        weight_format=codes.format,
        activation_format=activation,
        granularity="block",
        block_size=32,
        reduction=K,
    )
    told = lowering.kernel_for(weight, False)
    SEEN.clear()
    x = torch.randn(3, K)
    compiled(lambda x: F.linear(x, weight))(x)
    assert told in SEEN
    assert all(choice.target != REFERENCE for choice in SEEN)
