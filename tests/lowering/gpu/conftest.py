"""A quantized linear layer as a module, whose buffers a GPU's code takes as inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp4compile.compile import load_lowerings
from fp4compile.formats import by_name
from fp4compile.packing import pack


@pytest.fixture(autouse=True, scope="session")
def triton() -> None:
    """Nothing here runs without Triton."""
    pytest.importorskip("triton", reason="GPU code needs triton: pip install 'fp4compile[gpu]'")
    load_lowerings()


class Layer(nn.Module):
    """``fp4::linear`` with a random weight ``[N, K]`` that holds every code."""

    def __init__(self, N: int, K: int, format: str, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        bits = by_name(format).bits
        self.register_buffer("packed", pack(torch.randint(0, 2**bits, (N, K)).byte(), bits))
        self.register_buffer("scale", torch.rand(N) + 0.1)
        self.register_buffer("bias", torch.randn(N).to(dtype) if bias else None)
        self.format, self.dtype = format, dtype

    def forward(self, operand: Tensor, operand_scale: Tensor | None = None) -> Tensor:
        return torch.ops.fp4.linear(
            operand,
            operand_scale,
            self.packed,
            self.scale,
            self.bias,
            self.format,
            self.dtype,
        )


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """``layer(N, K, format="e2m1", bias=False, dtype=torch.float32)``."""

    def make(
        N: int,
        K: int,
        format: str = "e2m1",
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Layer:
        torch.manual_seed(0)
        return Layer(N, K, format, bias, dtype)

    return make
