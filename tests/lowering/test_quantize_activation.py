"""Compiled fp4::quantize_activation: equal codes, one kernel with its producer, vectorised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

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
