"""What the compilers make of the kernels, on every GPU: the expected instructions, no spills."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fp4compile.errors import CompileError
from fp4compile.lowering.gpus import GPUS, NVIDIA, gpu_by_name

# In the PTX or, for AMD, machine code.
INT8 = {
    "sm_80": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_89": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8",
    # Triton 3.7 does not know sm_100's own instruction for int8, 3.9 does.
    "sm_100": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32|kind::i8",
    "sm_120": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "gfx942": "v_mfma_i32_32x32x16_i8",
    "gfx950": "v_mfma_i32_32x32x32_i8",
}
BFLOAT16 = {
    "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
}


def compiled(linear, inputs, name):
    from fp4compile.lowering.testing import compile_for

    (graph,) = compile_for(linear, inputs, GPUS[name], dynamic=True)
    (kernel,) = (kernel for kernel in graph.kernels if "_tem_" in kernel.name)
    return kernel


@pytest.mark.parametrize("name", INT8)
def test_int8_tensor_cores(layer, int8_operand, name):
    kernel = compiled(layer(256, 512), (int8_operand(300, 512), torch.rand(300, 1)), name)
    assert any(instruction in kernel.assembly for instruction in INT8[name].split("|"))
    assert ("prmt.b32" in kernel.assembly) == kernel.is_nvidia
    assert kernel.local_memory == 0
    assert kernel.shared_memory <= GPUS[name].shared_memory


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_tensor_cores(layer, name):
    kernel = compiled(layer(256, 512), (torch.randn(300, 512).bfloat16(),), name)
    assert BFLOAT16[name] in kernel.assembly
    assert kernel.local_memory == 0
    assert kernel.shared_memory <= GPUS[name].shared_memory


# A loop's instructions that it needs whatever the weights are: memory, products, barriers and what
# is computed once per warp. Moves and addresses count as decoding.
NO_DECODING = re.compile(r"LD|ST|[A-Z]*MMA|[A-Z]*BAR|WARPGROUP|BRA|CALL|U[A-Z]")
# Beside the table, as most of its GPUs have one more relative.
ARCHITECTURES = {
    **{name: gpu for name, gpu in GPUS.items() if gpu.vendor == NVIDIA},
    "sm_86": replace(GPUS["sm_89"], name="sm_86", capability=86),
}


# A product of m16n8k32 takes 16 x 32 weights, of which each lane holds so many.
WEIGHTS_PER_PRODUCT = 16


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_decoding_takes_three_instructions_per_weight(layer, int8_operand, name):
    from fp4compile.lowering.testing import compile_for

    # Shorter sums are unrolled, and leave no loop to count in.
    linear, inputs = layer(4096, 4096), (int8_operand(8, 4096), torch.rand(8, 1))
    (graph,) = compile_for(linear, inputs, ARCHITECTURES[name], dynamic=True)
    (kernel,) = graph.kernels
    products = sum(count for name, count in kernel.loop.items() if name.startswith("IMMA.16832"))
    decoding = sum(count for name, count in kernel.loop.items() if not NO_DECODING.match(name))
    weights = WEIGHTS_PER_PRODUCT * products
    # Eight codes are not looked up by fewer than four permutations.
    assert weights / 2 <= decoding <= 3 * weights
    assert kernel.local_memory == 0


def test_unknown_gpu():
    with pytest.raises(CompileError, match="sm_90"):
        gpu_by_name("sm_1")
