"""Native 4-bit floats: the scaled products in the interpreter, and the instructions they become."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fp4compile.blocks import block_count, block_scales
from fp4compile.formats import by_name
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS
from fp4compile.packing import pack

linear = torch.ops.fp4.linear
E2M1 = torch.tensor(by_name("e2m1").integer_values, dtype=torch.int8)


class Scaled(nn.Module):
    """``fp4::linear`` of an E2M1 weight, told what the operand is made of."""

    def __init__(self, N, K, operand="e2m1", block_size=0, shift=None, shift_block=0):
        super().__init__()
        self.register_buffer("packed", pack(torch.randint(0, 16, (N, K)).byte(), 4))
        self.register_buffer("scale", torch.rand(1 if block_size else N) + 0.1)
        codes = torch.randint(0, 127, (N, block_count(K, block_size))) if block_size else None
        self.register_buffer("block_scale", None if codes is None else codes.byte())
        self.register_buffer("outer", torch.tensor(0.07) if block_size else None)
        self.register_buffer("shift", shift)
        self.operand, self.block_size, self.shift_block = operand, block_size, shift_block

    def forward(self, operand, operand_scale=None):
        return linear(
            operand,
            operand_scale,
            self.packed,
            self.scale,
            None,
            "e2m1",
            torch.float32,
            self.block_scale,
            self.block_size,
            self.operand,
            self.outer,
            self.shift,
            self.shift_block,
        )


def interpreted(layer, inputs, name):
    from fp4compile.lowering.testing import interpret

    result = interpret(layer, inputs, GPUS[name], dynamic=True)
    assert {choice.target for choice in SEEN} == {"triton_scaled"}
    return result


def e2m1(*shape):
    return E2M1[torch.randint(0, 16, shape)]


@pytest.mark.parametrize(
    ("name", "M", "N", "K"), [("sm_100", 5, 70, 1040), ("sm_120", 70, 40, 136)]
)
def test_e2m1_times_e2m1_is_exact(name, M, N, K):
    layer, inputs = Scaled(N, K), (e2m1(M, K), torch.rand(M, 1))
    assert torch.equal(interpreted(layer, inputs, name), layer(*inputs))


@pytest.mark.parametrize("name", ["sm_100", "gfx950"])
def test_shifts_in_blocks_are_exact(name):
    M, N, K = 20, 40, 192
    shift = torch.tensor([0, 1, 1, 2, 3, 3], dtype=torch.int8).repeat_interleave(32)
    layer = Scaled(N, K, shift=shift, shift_block=32)
    inputs = (e2m1(M, K) << shift, torch.rand(M, 1))
    assert torch.equal(interpreted(layer, inputs, name), layer(*inputs))


@pytest.mark.parametrize(
    ("operand", "shifted"), [("e2m1", True), ("e1m2", True), ("e3m0", False), ("e4m3", False)]
)
def test_other_operands_are_8_bit_floats(operand, shifted):
    M, N, K = 20, 40, 160
    fmt = by_name(operand)
    values = torch.tensor(fmt.integer_values)[torch.randint(0, 2**fmt.bits, (M, K))]
    shift = torch.randint(0, fmt.max_shift + 1, (K,), dtype=torch.int8) if shifted else None
    if shift is not None:
        values = values << shift
    x = values.to(torch.int8 if fmt.fits_int8 else torch.bfloat16)
    layer, inputs = Scaled(N, K, operand, shift=shift), (x, torch.rand(M, 1))
    expected = layer(*inputs)
    result = interpreted(layer, inputs, "sm_100")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "block_size", "granularity"),
    [("sm_120", 16, "block"), ("sm_100", 32, "block"), ("sm_120", 64, "token")],
)
def test_blocks_with_e4m3_scales(name, block_size, granularity):
    M, N, K = 20, 40, 136
    layer = Scaled(N, K, block_size=block_size)
    codes = torch.randint(1, 127, (M, block_count(K, block_size))).byte()
    scale = block_scales(codes, layer.outer) if granularity == "block" else torch.rand(M, 1)
    inputs = (e2m1(M, K), scale)
    expected = layer(*inputs)
    result = interpreted(layer, inputs, name)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# Regular expressions; PTX of triton 3.9 calls scale_vec::2X, for one, block32.
MXFP4 = {
    "sm_100": r"kind::mxf4\.block_scale\.(scale_vec::2X|block32)",
    "sm_120": "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    "gfx950": "v_mfma_scale_f32_",
}
NVFP4 = {
    "sm_100": r"kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
    "sm_120": "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
}
MIXED = {
    "sm_100": r"kind::mxf8f6f4\.block_scale\.(scale_vec::1X|block32)",
    "gfx950": "v_mfma_scale_f32_",
}


def check_code(layer, inputs, name, instruction):
    from fp4compile.lowering.testing import compile_for

    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=True)
    kernel = next(kernel for kernel in graph.kernels if "_tem_" in kernel.name)
    assert re.search(instruction, kernel.assembly)
    assert not re.search(r"mma[\w.:]*bf16|mfma\w*bf16", kernel.assembly)  # the fall-back
    assert kernel.local_memory == 0
    assert kernel.shared_memory <= GPUS[name].shared_memory


@pytest.mark.parametrize("M", [8, pytest.param(50, marks=pytest.mark.slow), 200])
@pytest.mark.parametrize("name", MXFP4)
def test_mxfp4_instructions(name, M):
    shift = torch.zeros(512, dtype=torch.int8)
    layer = Scaled(256, 512, shift=shift, shift_block=32)
    check_code(layer, (e2m1(M, 512), torch.rand(M, 1)), name, MXFP4[name])


@pytest.mark.parametrize("M", [8, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NVFP4)
def test_nvfp4_instructions(name, M):
    inputs = (e2m1(M, 512), torch.rand(M, 32))
    check_code(Scaled(256, 512, block_size=16), inputs, name, NVFP4[name])


@pytest.mark.parametrize("name", MIXED)
def test_mixed_instructions(name):
    inputs = (torch.randn(200, 512).bfloat16(), torch.rand(200, 1))
    check_code(Scaled(256, 512, "e4m3"), inputs, name, MIXED[name])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sm_90", {}, "does not multiply 4-bit floats"),
        ("sm_120", {"weight_format": "e1m2"}, "e1m2 is not e2m1"),
        ("sm_120", {"operand_format": "e4m3"}, "multiplies it with nothing else"),
        ("sm_120", {"shift_block": 1}, "multiplies it with nothing else"),
        ("sm_100", {"operand_format": "e1m6"}, "not those of e4m3"),
        ("sm_100", {"operand_format": ""}, "in no 8-bit float"),
        ("gfx950", {"block_size": 16}, "no E4M3 scales"),
        ("sm_100", {"block_size": 16, "operand_format": ""}, "no block scales in hardware"),
    ],
)
def test_declines_with_reasons(name, changes, reason):
    from fp4compile.lowering.problem import GemmProblem
    from fp4compile.lowering.targets import triton_scaled

    example = {
        "N": 64,
        "K": 64,
        "weight_format": "e2m1",
        "operand_dtype": torch.int8,
        "operand_scale": "token",
        "block_size": 0,
        "bias": False,
        "out_dtype": torch.float32,
        "device": "cuda",
        "architecture": name,
        "operand_format": "e2m1",
    }
    assert reason in triton_scaled.TARGET.supports(GemmProblem(**example | changes))
