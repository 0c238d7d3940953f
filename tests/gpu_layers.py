"""Layers and operands that tests of GPU kernels share."""

from __future__ import annotations

import torch
from torch import nn

from fp4compile.blocks import block_count
from fp4compile.formats import by_name
from fp4compile.lowering.gpus import GPUS
from fp4compile.packing import pack

E2M1 = torch.tensor(by_name("e2m1").integer_values, dtype=torch.int8)


class Siblings(nn.Module):
    """``fp4::linears`` of three weights; with blocks each has an outer scale of its own."""

    def __init__(self, rows, K, format, bias, block_size=0):
        super().__init__()
        for i, N in enumerate(rows):
            self.register_buffer(f"packed{i}", pack(torch.randint(0, 16, (N, K)).byte(), 4))
            self.register_buffer(f"scale{i}", torch.rand(1 if block_size else N) + 0.1)
            self.register_buffer(f"bias{i}", torch.randn(N))
            if block_size:
                codes = torch.randint(1, 127, (N, block_count(K, block_size))).byte()
                self.register_buffer(f"block{i}", codes)
        self.outer = nn.Buffer(torch.tensor(0.05)) if block_size else None
        self.count, self.format, self.bias, self.block_size = len(rows), format, bias, block_size

    def forward(self, operand, operand_scale):
        def each(name):
            return [getattr(self, f"{name}{i}") for i in range(self.count)]

        return torch.ops.fp4.linears(
            operand,
            operand_scale,
            each("packed"),
            each("scale"),
            each("bias") if self.bias else [],
            self.format,
            torch.float32,
            each("block") if self.block_size else [],
            self.block_size,
            "e2m1",
            self.outer,
        )


def e2m1(*shape):
    return E2M1[torch.randint(0, 16, shape)]


def block_scales(M, blocks, outer):
    """float32 ``[M, blocks]``: random E4M3 numbers times ``outer``."""
    codes = torch.randint(1, 127, (M, blocks)).byte()
    return codes.view(torch.float8_e4m3fn).float() * outer


def launched(layer, inputs, name="sm_90"):
    """``layer(*inputs)`` by the one GEMM that the GPU would launch."""
    from fp4compile.lowering.testing import interpret_with_sources

    result, (source,) = interpret_with_sources(layer, inputs, GPUS[name], dynamic=True)
    assert source.count("async_compile.triton('triton_tem") == 1
    return result


def gemm_kernels(layer, inputs, name):
    """What the compiler makes of the GEMMs of the GPU."""
    from fp4compile.lowering.testing import compile_for

    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=True)
    return [kernel for kernel in graph.kernels if "_tem_" in kernel.name]
