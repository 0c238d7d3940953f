"""Compiled fp4::linear within a graph: batches, epilogues, shared buffers, changing rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.lowering.targets import CppTarget

Make = Callable[..., Any]

linear = torch.ops.fp4.linear


def test_bfloat16_operand_with_scale(
    compiled: Make, random_weight: Make, target: CppTarget
) -> None:
    weight = random_weight(40, 96, "e2m1")

    def run(operand: Tensor, scale: Tensor) -> Tensor:
        return linear(operand, scale, weight.packed, weight.scale, None, "e2m1", torch.float32)

    operand = torch.randint(-448, 449, (7, 96)).to(torch.bfloat16)
    scale = torch.rand(7, 1)
    torch.testing.assert_close(compiled(run)(operand, scale), run(operand, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_operand_and_fused_epilogue(
    compiled: Make,
    random_weight: Make,
    int8_operand: Make,
    fusions: Make,
    target: CppTarget,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(70, 64, "e2m1", dtype)

    def run(operand: Tensor, scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        y = linear(operand, scale, weight.packed, weight.scale, weight.bias, "e2m1", dtype)
        return torch.nn.functional.silu(y) * gate + residual

    fast = compiled(run)
    fused = fusions()
    for batch in ((2, 5), (3, 1), (2, 40)):
        operand, scale = int8_operand(*batch, 64), torch.rand(*batch, 1) * 1e-3
        gate, residual = torch.randn(*batch, 70).to(dtype), torch.randn(*batch, 70).to(dtype)
        # Between the fused steps nothing is rounded to bfloat16.
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(
            fast(operand, scale, gate, residual),
            run(operand, scale, gate, residual),
            rtol=tolerance,
            atol=tolerance,
        )
    assert fusions() > fused


def test_result_with_two_users(
    compiled: Make, random_weight: Make, int8_operand: Make, target: CppTarget
) -> None:
    weight = random_weight(33, 64, "e2m1")

    def run(operand: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = linear(operand, scale, weight.packed, weight.scale, None, "e2m1", torch.float32)
        return torch.relu(y), y, y.sum(-1)

    operand, scale = int8_operand(9, 64), torch.rand(9, 1)
    for fast, slow in zip(compiled(run)(operand, scale), run(operand, scale), strict=True):
        torch.testing.assert_close(fast, slow)


def test_sliced_operand_and_shared_buffers(
    compiled: Make, random_weight: Make, int8_operand: Make, target: CppTarget
) -> None:
    weight = random_weight(16, 32, "e2m1")

    def run(operand: Tensor) -> Tensor:
        return linear(  # the scale is the bias as well: one buffer, two arguments
            operand[:, -1], None, weight.packed, weight.scale, weight.scale, "e2m1", torch.float32
        )

    operand = int8_operand(3, 5, 32)
    assert torch.equal(compiled(run)(operand), run(operand))


def test_rows_change_without_a_recompile(
    compiled: Make, random_weight: Make, int8_operand: Make, target: CppTarget
) -> None:
    weight = random_weight(32, 64, "e2m1")

    def run(operand: Tensor, scale: Tensor) -> Tensor:
        return linear(operand, scale, weight.packed, weight.scale, None, "e2m1", torch.float32)

    fast = compiled(run)
    with torch.compiler.set_stance("default"):
        fast(int8_operand(3, 64), torch.rand(3, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for M in (2, 17, 300):
            fast(int8_operand(M, 64), torch.rand(M, 1))


def test_no_rows(
    compiled: Make, random_weight: Make, int8_operand: Make, target: CppTarget
) -> None:
    weight = random_weight(32, 64, "e2m1")

    def run(operand: Tensor, scale: Tensor) -> Tensor:
        return linear(operand, scale, weight.packed, weight.scale, None, "e2m1", torch.float32)

    assert compiled(run)(int8_operand(0, 64), torch.rand(0, 1)).shape == (0, 32)
