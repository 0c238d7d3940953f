"""Compiled fp4::embedding equals the eager reference bit for bit, for every width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]


@pytest.mark.parametrize("format", ["e2m1", "e3m0", "e1m2", "e2m3", "e4m3"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_equals_eager(
    compiled: Make, random_weight: Make, format: str, out_dtype: torch.dtype
) -> None:
    K = 37
    weight = random_weight(50, K, format)

    def run(indices: Tensor) -> Tensor:
        return torch.ops.fp4.embedding(indices, weight.packed, weight.scale, format, K, out_dtype)

    indices = torch.randint(0, 50, (3, 7))
    assert torch.equal(compiled(run)(indices), run(indices))
