"""Stacks of experts as a GPU computes them, in Triton's interpreter, against the eager op."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import block_scales, e2m1, gemm_kernels, launched
from models import tiny_mixtral, tokens
from torch import nn

import fp4compile
from fp4compile.blocks import SECOND_FORMAT, block_count
from fp4compile.formats import by_name
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS
from fp4compile.packing import pack

E, N, K = 5, 40, 96


class Stack(nn.Module):
    """``fp4::grouped_linear`` of random weights; with blocks each has an outer scale of its own."""

    def __init__(self, format="e2m1", block_size=0, operand_format="", dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        bits = by_name(format.split("|")[0]).bits
        codes = torch.randint(0, 2**bits, (E, N, K)).byte()
        self.register_buffer("packed", pack(codes, bits))
        self.register_buffer("scale", torch.rand((E, 1, 1) if block_size else (E, N)) + 0.1)
        blocks = torch.randint(0, 127, (E, N, block_count(K, block_size or K))).byte()
        flags = SECOND_FORMAT * torch.randint(0, 1 + ("|" in format), blocks.shape).byte()
        self.register_buffer("blocks", blocks | flags if block_size else None)
        self.outer = nn.Buffer(torch.tensor(0.05)) if operand_format else None
        self.format, self.block_size, self.dtype = format, block_size, dtype
        self.operand_format = operand_format

    def forward(self, operand, scale, ends):
        return torch.ops.fp4.grouped_linear(
            operand,
            scale,
            self.packed,
            self.scale,
            ends,
            self.format,
            self.dtype,
            self.blocks,
            self.block_size,
            self.operand_format,
            self.outer,
        )


def ends_of(*counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


# Experts without a row, with one, with tiles of their own, and rows that are no expert's.
ENDS = {
    "few": (7, ends_of(0, 1, 3, 0, 2)),
    "one": (1, ends_of(0, 0, 0, 1, 0)),
    "none": (3, ends_of(0, 0, 0, 0, 0)),
    "many": (500, ends_of(130, 0, 1, 300, 40)),
}


@pytest.mark.parametrize("case", ENDS)
def test_bit_for_bit(case):
    rows, ends = ENDS[case]
    layer, inputs = Stack(), (e2m1(rows, K), torch.rand(rows, 1), ends)
    assert torch.equal(launched(layer, inputs), layer(*inputs))
    assert {choice.target for choice in SEEN} == {"triton_int8"}


@pytest.mark.parametrize(
    ("layer", "operand", "scale", "target"),
    [
        (Stack("e2m1|e1m2", 32), torch.int8, "token", "triton_blocks"),
        (Stack("e2m1|e1m2", 32, "e2m1"), torch.int8, "block", "triton_blocks"),
        (Stack("e2m1", 16), torch.bfloat16, None, "triton_blocks"),
        (Stack(), torch.float32, None, "triton_float"),
        (Stack(dtype=torch.bfloat16), torch.bfloat16, None, "triton_float"),
        (Stack("e2m3"), torch.int8, "tensor", "triton_wide"),
    ],
)
@pytest.mark.parametrize("case", ["few", "many"])
def test_routes(layer, operand, scale, target, case):
    rows, ends = ENDS[case]
    x = e2m1(rows, K) if operand == torch.int8 else torch.randn(rows, K).to(operand)
    if scale == "block":
        factor = block_scales(rows, K // 32, layer.outer)
    else:
        factor = {"token": torch.rand(rows, 1), "tensor": torch.rand(()), None: None}[scale]
    inputs = x, factor, ends
    expected, result = layer(*inputs), launched(layer, inputs)
    bound = 1e-6 * float(expected.abs().max())
    # The interpreter cuts a bfloat16 off.
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=bound)
    assert {choice.target for choice in SEEN} == {target}


def test_what_reads_the_result_is_part_of_the_kernel():
    from fp4compile.lowering.testing import interpret_with_sources

    rows, ends = ENDS["few"]
    stack, gate = Stack(), torch.randn(rows, N)
    inputs = (e2m1(rows, K), torch.rand(rows, 1), ends.long(), gate)

    def run(operand, scale, ends, gate):
        return torch.relu(stack(operand, scale, ends)) * gate

    result, (source,) = interpret_with_sources(run, inputs, GPUS["sm_90"], dynamic=True)
    assert source.count("async_compile.triton(") == 1
    torch.testing.assert_close(result, run(*inputs))


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("rows", [8, 4000])
@pytest.mark.parametrize("block_size", [0, 32])
def test_compiles(name, rows, block_size):
    stack = Stack("e2m1|e1m2" if block_size else "e2m1", block_size)
    inputs = (e2m1(rows, K), torch.rand(rows, 1), ends_of(*E * [rows // E]))
    (kernel,) = gemm_kernels(stack, inputs, name)
    assert kernel.local_memory == 0
    assert kernel.shared_memory <= GPUS[name].shared_memory
    assert "mma" in kernel.assembly or "mfma" in kernel.assembly


def test_a_whole_model():
    from fp4compile.lowering.testing import interpret

    model, ids = tiny_mixtral(), tokens(2, 9)
    fp4compile.quantize(model, [ids], "w4a4", method="minmax", progress=False)

    def logits(ids):
        return model(input_ids=ids, use_cache=False).logits

    result = interpret(logits, (ids,), GPUS["sm_90"], dynamic=True)
    torch.testing.assert_close(result, logits(ids), rtol=1e-4, atol=1e-4)
    assert {choice.target for choice in SEEN} == {"triton_int8"}
    assert sum(choice.problem.startswith("grouped") for choice in SEEN) == 2
