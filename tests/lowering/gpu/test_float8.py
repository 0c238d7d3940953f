"""8-bit float activations on fp8 tensor cores."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import gemm_kernels
from torch import nn

from fp4compile.formats import by_name
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS
from fp4compile.lowering.targets.triton_float8 import FNUZ, OCP, exact
from fp4compile.packing import pack

INSTRUCTIONS = {
    "sm_89": "mma.sync.aligned.m16n8k32.row.col.f32.{0}.{0}.f32",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n128k32.f32.{0}.{0}",
    "sm_120": "mma.sync.aligned.m16n8k32.row.col",
    "gfx942": "v_mfma_f32_32x32x16_fp8_fp8|v_mfma_f32_32x32x16_bf8_bf8",
}


class Layer(nn.Module):
    def __init__(self, N, K, operand):
        super().__init__()
        self.register_buffer("packed", pack(torch.randint(0, 16, (N, K)).byte(), 4))
        self.register_buffer("scale", torch.rand(N) + 0.1)
        self.operand = operand

    def forward(self, x, scale):
        return torch.ops.fp4.linear(
            x,
            scale,
            self.packed,
            self.scale,
            None,
            "e2m1",
            torch.float32,
            operand_format=self.operand,
        )


def operand(format, *shape):
    fmt = by_name(format)
    values = torch.tensor(fmt.integer_values, dtype=torch.float32)
    return values[torch.randint(0, 2**fmt.bits, shape)].bfloat16()


@pytest.mark.parametrize(
    ("name", "format", "M", "kernel"),
    [
        ("sm_90", "e4m3", 80, "triton_float8"),
        ("sm_89", "e5m2", 65, "triton_float8"),
        ("sm_90", "e5m2", 3, "triton_float"),
        ("sm_120", "e4m3", 16, "triton_float"),
    ],
)
def test_products_are_those_of_the_eager_op(name, format, M, kernel):
    from fp4compile.lowering.testing import interpret_with_sources

    layer, inputs = Layer(70, 200, format), (operand(format, M, 200), torch.rand(M, 1))
    expected = layer(*inputs)
    result, (source,) = interpret_with_sources(layer, inputs, GPUS[name], dynamic=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert {choice.target for choice in SEEN} == {"triton_float8"}
    assert f'"kernel": "{kernel}"' in source


@pytest.mark.parametrize("format", ["e4m3", pytest.param("e5m2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(name, format):
    layer, inputs = Layer(256, 512, format), (operand(format, 200, 512), torch.rand(200, 1))
    (kernel,) = gemm_kernels(layer, inputs, name)
    expected = INSTRUCTIONS[name].format(format).split("|")
    assert any(instruction in kernel.assembly for instruction in expected)
    assert "bf16.bf16" not in kernel.assembly
    assert kernel.local_memory == 0


@pytest.mark.parametrize("types", [OCP, FNUZ], ids=["ocp", "fnuz"])
@pytest.mark.parametrize("format", OCP)
def test_every_value_of_the_format_is_one_of_the_type(types, format):
    fmt = by_name(format)
    factor = fmt.default_step / (2 if types is FNUZ else 1)
    assert exact(tuple(value * factor for value in fmt.integer_values), types[format][1])
