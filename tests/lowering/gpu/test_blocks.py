"""Block scales as the GPU's code computes them, in Triton's interpreter, against the eager op."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import block_scales, gemm_kernels
from torch import nn

from fp4compile.blocks import SECOND_FORMAT, block_count
from fp4compile.formats import alternatives
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS
from fp4compile.ops.quantize_activation import operand_dtype
from fp4compile.packing import pack

linear = torch.ops.fp4.linear


class BlockLayer(nn.Module):
    """``fp4::linear`` with E4M3 scales of all magnitudes, subnormal ones too, and both formats."""

    def __init__(self, N: int, K: int, format: str, block_size: int) -> None:
        super().__init__()
        codes = torch.randint(0, 127, (N, block_count(K, block_size)), dtype=torch.uint8)
        flags = SECOND_FORMAT * torch.randint(0, 1 + ("|" in format), codes.shape)
        self.register_buffer("packed", pack(torch.randint(0, 16, (N, K)).byte(), 4))
        self.register_buffer("outer", torch.tensor([0.03]))
        self.register_buffer("block_scale", codes | flags.byte())
        self.register_buffer("bias", torch.randn(N))
        self.format, self.block_size = format, block_size

    def forward(self, operand, operand_scale=None, operand_format="", operand_outer=None):
        return linear(
            operand,
            operand_scale,
            self.packed,
            self.outer,
            self.bias,
            self.format,
            torch.float32,
            self.block_scale,
            self.block_size,
            operand_format,
            operand_outer,
        )


@pytest.mark.parametrize(
    ("format", "block_size", "granularity", "M"),
    [
        ("e2m1|e1m2", 32, "block", 5),
        ("e2m1", 16, "block", 70),
        ("e2m1|e1m2", 64, "token", 20),
        ("e3m0", 32, None, 1),
    ],
)
def test_int8_operand(int8_operand, format, block_size, granularity, M):
    from fp4compile.lowering.testing import interpret

    torch.manual_seed(0)
    N, K = 40, 136
    blocks = block_count(K, block_size)
    scale = {"block": torch.rand(M, blocks), "token": torch.rand(M, 1), None: None}[granularity]
    layer, inputs = BlockLayer(N, K, format, block_size), (int8_operand(M, K), scale)
    expected = layer(*inputs)
    result = interpret(layer, inputs, GPUS["sm_90"], dynamic=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert {choice.target for choice in SEEN} == {"triton_blocks"}


@pytest.mark.parametrize(
    ("operand_format", "M"),
    [("e2m1|e1m2", 1), ("e2m1|e1m2", 5), ("e4m3", 3), ("e1m6", 5), ("e2m3", 70)],
)
def test_operands_in_blocks(operand_format, M):
    from fp4compile.lowering.testing import interpret

    torch.manual_seed(0)
    N, K = 40, 128
    fmt = alternatives(operand_format)[0]
    values = torch.tensor(fmt.integer_values, dtype=torch.float32)
    operand = values[torch.randint(0, len(values), (M, K))].to(operand_dtype(operand_format))
    outer = torch.tensor(0.013)
    scale = block_scales(M, K // 32, outer)
    layer = BlockLayer(N, K, "e2m1|e1m2", 32)
    expected = layer(operand, scale, operand_format, outer)

    def run(operand, scale, outer):
        return layer(operand, scale, operand_format, outer)

    result = interpret(run, (operand, scale, outer), GPUS["sm_90"])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weight_only(dtype):
    from fp4compile.lowering.testing import interpret

    torch.manual_seed(0)
    layer, inputs = BlockLayer(40, 96, "e2m1|e1m2", 32), (torch.randn(9, 96).to(dtype),)
    expected = layer(*inputs)
    result = interpret(layer, inputs, GPUS["sm_90"], dynamic=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "M", "instruction"),
    [
        ("sm_80", 200, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("sm_90", 200, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        ("sm_90", 3, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    ],
)
def test_instructions(int8_operand, name, M, instruction):
    layer = BlockLayer(256, 256, "e2m1|e1m2", 32)
    inputs = (int8_operand(M, 256), torch.rand(M, 1))
    (kernel,) = gemm_kernels(layer, inputs, name)
    assert instruction in kernel.assembly
    assert kernel.local_memory == 0
