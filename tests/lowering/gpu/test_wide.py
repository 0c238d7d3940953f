"""Weights of 6 and 8 bits on a GPU, in the interpreter, against the eager op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.formats import by_name, of_width
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS
from fp4compile.ops.quantize_activation import operand_dtype
from fp4compile.packing import pack

# Every format, with an operand that takes it to one of the three kinds of tensor cores.
OPERANDS = {"e2m3": "e2m3", "e1m4": "e1m6", "e1m6": "e1m6", "e4m3": "e4m3", "e5m2": "e5m2"}
INSTRUCTIONS = {
    ("sm_80", "e2m3"): "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    ("sm_90", "e4m3"): "f32.e4m3.e4m3",
    ("sm_80", "e4m3"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ("gfx942", "e3m2"): "bf16",
}


class Wide(nn.Module):
    def __init__(self, N, K, format, operand):
        super().__init__()
        fmt = by_name(format)
        # Not those of NaN and infinity, which no quantizer makes.
        codes = torch.randint(0, len(fmt.magnitudes), (N, K))
        codes |= torch.randint(0, 2, (N, K)) << (fmt.bits - 1)
        self.register_buffer("packed", pack(codes.byte(), fmt.bits))
        self.register_buffer("scale", torch.rand(N) + 0.1)
        self.format, self.operand = format, operand

    def forward(self, x, scale=None):
        return torch.ops.fp4.linear(
            x,
            scale,
            self.packed,
            self.scale,
            None,
            self.format,
            torch.float32,
            operand_format=self.operand,
        )


def operand(format, *shape):
    fmt = by_name(format)
    values = torch.tensor(fmt.integer_values, dtype=torch.float32)
    return values[torch.randint(0, 2**fmt.bits, shape)].to(operand_dtype(format))


def layer_and_inputs(format, M, N, K):
    wanted = OPERANDS.get(format, "e2m1")
    return Wide(N, K, format, wanted), (operand(wanted, M, K), torch.rand(M, 1))


def check(layer, inputs, *, exact):
    from fp4compile.lowering.testing import interpret

    expected, result = layer(*inputs), interpret(layer, inputs, GPUS["sm_90"], dynamic=True)
    tolerance = 0.0 if exact else 1e-5
    bound = tolerance * float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=bound)
    assert {choice.target for choice in SEEN} == {"triton_wide"}


# The others differ in numbers, not in the kernel's text.
FAST = ("e2m3", "e3m2", "e4m3", "e1m6", "e3m4")
FORMATS = [
    pytest.param(fmt.name, marks=() if fmt.name in FAST else pytest.mark.slow)
    for fmt in (*of_width(6), *of_width(8))
]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format):
    fmt = by_name(format)
    layer, inputs = layer_and_inputs(format, 5, 40, 70)
    check(layer, inputs, exact=inputs[0].dtype == torch.int8 and fmt.fits_int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_only(dtype):
    check(Wide(40, 70, "e2m3", ""), (torch.randn(20, 70).to(dtype),), exact=False)


@pytest.mark.parametrize(("name", "format"), INSTRUCTIONS)
def test_instructions(name, format):
    from fp4compile.lowering.testing import compile_for

    layer, inputs = layer_and_inputs(format, 200, 256, 512)
    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=True)
    (kernel,) = graph.kernels
    assert INSTRUCTIONS[name, format] in kernel.assembly
    assert kernel.local_memory == 0
