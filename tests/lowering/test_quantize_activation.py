"""Compiled fp4::quantize_activation: equal codes, one kernel with its producer, vectorised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fp4compile import lowering
from fp4compile.lowering.choice import SEEN

Make = Callable[..., Any]

quantize = torch.ops.fp4.quantize_activation


@pytest.mark.parametrize("format", ["e2m1", "e1m2", "e3m0", "e4m3", "e1m6"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_equals_eager(compiled: Make, format: str, granularity: str) -> None:
    K = 52
    x = torch.randn(40, K) * torch.logspace(-3, 3, 40).unsqueeze(-1)
    x[3] = 0
    x[4, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    x[5] = torch.arange(K) * 0.25 - 6  # every tie
    shift = torch.randint(0, 3, (K,), dtype=torch.int8) if format == "e2m1" else None
    scale = torch.tensor(0.5 if granularity == "tensor" else 0.9)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(x, scale, shift, format, granularity)

    for fast, slow in zip(compiled(run)(x), run(x), strict=True):
        assert fast.dtype == slow.dtype
        assert torch.equal(fast.float().nan_to_num(), slow.float().nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_fuses_with_its_producer(compiled: Make, granularity: str, dtype: torch.dtype) -> None:
    shift = torch.randint(0, 3, (576,), dtype=torch.int8)
    scale = torch.tensor(0.9)

    def run(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(torch.nn.functional.silu(x) * gate, scale, shift, "e2m1", granularity)

    x, gate = torch.randn(37, 576).to(dtype), torch.randn(37, 576).to(dtype)
    _, (code,) = run_and_get_code(compiled(run), x, gate)
    assert code.count("async_compile.cpp_pybinding") == 1
    assert "at::vec::Vectorized<float>" in code
    assert "torch.ops.fp4" not in code


@pytest.mark.parametrize("granularity", ["tensor", "token", "block"])
def test_reads_part_of_a_buffer(compiled: Make, granularity: str) -> None:
    """The last position of a prompt, as a head does, and parameters that are slices themselves."""
    scale = torch.tensor([7.0, 0.9])
    shift = torch.randint(0, 3, (2, 64), dtype=torch.int8)
    block_size = 32 if granularity == "block" else 0

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        last = (x * 2)[:, -1:]
        return quantize(
            last, scale[1], shift[1], "e2m1", granularity, rotation=8, block_size=block_size
        )

    x = torch.randn(1, 5, 64)
    for fast, slow in zip(compiled(run)(x), run(x), strict=True):
        assert torch.equal(fast, slow)


def extremes(M: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows of all magnitudes; zeros, every tie, NaN and infinities among them."""
    x = torch.randn(M, K) * torch.logspace(-3, 3, M).unsqueeze(-1)
    if M > 6:
        x[1] = 0
        x[2, K // 2] = torch.nan
        x[3, 0], x[3, -1] = torch.inf, -torch.inf
        x[4] = torch.arange(K) * 0.25 - 6
        x[5] *= 1e-35
        x[6] *= 1e35
    return x.to(dtype)


@pytest.mark.parametrize(
    ("format", "granularity", "rotation", "block_size", "block_clip", "K", "dtype", "shift"),
    [
        ("e2m1|e1m2", "block", 64, 32, 0.85, 576, torch.float32, None),
        ("e2m1|e1m2", "block", 1, 32, 0.85, 131, torch.float32, "in weight"),
        ("e2m1|e1m2", "block", 512, 32, 0.85, 1536, torch.bfloat16, "in weight"),
        ("e2m1", "block", 8, 16, 1.0, 200, torch.float16, "folded"),
        ("e1m2|e3m0", "block", 2, 64, 0.9, 130, torch.float32, None),
        ("e1m6|e2m5", "block", 4, 128, 0.85, 300, torch.float32, None),
        ("e2m1", "block", 1, 8, 0.85, 77, torch.float32, "back"),
        ("e4m3", "block", 16, 8, 1.0, 80, torch.bfloat16, None),
        ("e2m1", "token", 64, 0, 1.0, 576, torch.float32, "in weight"),
        ("e4m3", "token", 512, 0, 1.0, 1024, torch.float32, None),
        ("e3m0", "tensor", 16, 0, 1.0, 80, torch.bfloat16, None),
    ],
)
def test_blocks_and_rotation_equal_eager(
    compiled: Make,
    format: str,
    granularity: str,
    rotation: int,
    block_size: int,
    block_clip: float,
    K: int,
    dtype: torch.dtype,
    shift: str | None,
) -> None:
    scale = torch.tensor(0.05 if granularity == "block" else 0.7)
    exponents = torch.randint(0, 3, (K,), dtype=torch.int8) if shift else None

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(
            x, scale, exponents, format, granularity, shift == "folded",
            shift in ("in weight", "folded"), rotation, block_size, block_clip,
        )  # fmt: skip

    fast = compiled(run)
    for M, threads in ((43, 1), (43, 2), (1, 1), (0, 1)):
        torch.set_num_threads(threads)
        x = extremes(M, K, dtype)
        for got, expected in zip(fast(x), run(x), strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert torch.equal(got.float().nan_to_num(12345), expected.float().nan_to_num(12345))
    assert {choice.target for choice in SEEN} == {"cpp"}


def test_block_scales_without_a_finite_reciprocal(compiled: Make) -> None:
    smallest = torch.tensor(2.0**-126)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(x, smallest, None, "e2m1|e1m2", "block", block_size=16)

    x = torch.randn(3, 48) * 2.0**-131
    x[0] = 0.0
    x[1, :9] = 0.0
    got, expected = compiled(run)(x), run(x)
    assert expected[1].reciprocal().isinf().any()
    for fast, slow in zip(got, expected, strict=True):
        assert torch.equal(fast, slow)
    assert torch.equal(got[0][0], torch.zeros(48, dtype=torch.int8))


def block_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, torch.tensor(0.01), None, "e2m1", "block", rotation=8, block_size=32)


@pytest.mark.parametrize(
    "use",
    [
        lambda operand, scale: operand.float() * 2,
        lambda operand, scale: scale * 2,
        lambda operand, scale: (operand.float() * 3, scale + 1, operand),
    ],
    ids=["operand", "scale", "both"],
)
def test_results_may_go_unused_or_on(compiled: Make, use: Callable[..., Any]) -> None:
    def run(x: Tensor) -> Any:
        return use(*block_quantize(x * 2))

    x = torch.randn(2, 3, 72)
    got, (code,) = run_and_get_code(compiled(run), x)
    assert "torch.ops.fp4" not in code
    for fast, slow in zip(got, run(x), strict=True):
        assert torch.equal(fast, slow)


def test_forced_reference_is_logged(compiled: Make, caplog: pytest.LogCaptureFixture) -> None:
    lowering.config.cpu_target = "reference"
    x = torch.randn(3, 64)
    for fast, slow in zip(compiled(block_quantize)(x), block_quantize(x), strict=True):
        assert torch.equal(fast, slow)
    (choice,) = SEEN
    assert choice.is_reference
    assert "rotation 8: reference (forced" in caplog.text
