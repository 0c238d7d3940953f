"""What the compilers make of the kernels, on every GPU: the expected instructions, no spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import gemm_kernels

from fp4compile.errors import CompileError
from fp4compile.lowering.gpus import GPUS, NVIDIA, gpu_by_name
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import triton_int8

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
    (kernel,) = gemm_kernels(linear, inputs, name)
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


# Beside the table, as most of its GPUs have one more relative.
ARCHITECTURES = {
    **{name: gpu for name, gpu in GPUS.items() if gpu.vendor == NVIDIA},
    "sm_86": replace(GPUS["sm_89"], name="sm_86", capability=86),
}
PROBLEM = GemmProblem(
    256, 16384, "e2m1", torch.int8, "token", 0, False, torch.float32, "cuda", "sm_90"
)


def loop_of_few_rows(layer, int8_operand, gpu, K, M):
    """The kernel of ``M`` rows and ``K`` channels; how many weights a lane decodes in a step."""
    from fp4compile.lowering.testing import compile_for

    linear, inputs = layer(256, K), (int8_operand(M, K), torch.rand(M, 1))
    (graph,) = compile_for(linear, inputs, gpu, dynamic=M > 1)
    (kernel,) = graph.kernels
    target = triton_int8.TARGET.for_rows(PROBLEM, 1 if M == 1 else 16)
    tile = target.tile(PROBLEM, 16)
    lanes = 32 * tile.num_warps
    codes = 8 if M == 1 else 1  # of what block_k counts
    return kernel, tile.block_n * tile.block_k * tile.slices * codes // lanes


@pytest.mark.parametrize(
    ("name", "M"), [*((name, 8) for name in sorted(ARCHITECTURES)), ("sm_80", 1), ("sm_120", 1)]
)
def test_a_weight_takes_three_instructions(layer, int8_operand, name, M):
    # Shorter sums are unrolled, and leave no loop to count in.
    kernel, weights = loop_of_few_rows(layer, int8_operand, ARCHITECTURES[name], 16384, M)
    permutations = sum(n for name, n in kernel.loop.items() if name.startswith("PRMT"))
    # Eight codes are looked up by six, and some compilers unroll the loop.
    steps = max(1, round(permutations / (6 / 8 * weights)))
    assert permutations >= 6 / 8 * weights
    assert kernel.loop.total() <= 3 * steps * weights
    assert kernel.local_memory == 0


@pytest.mark.parametrize("rows", [64, 513])
@pytest.mark.parametrize("name", ["sm_80", "sm_120", "gfx942"])
def test_tiles_fit(layer, int8_operand, name, rows):
    for x in (int8_operand(rows, 512), torch.randn(rows, 512).bfloat16()):
        kernel = compiled(layer(256, 512), (x,), name)
        assert kernel.local_memory == 0
        assert kernel.shared_memory <= GPUS[name].shared_memory


def test_unknown_gpu():
    with pytest.raises(CompileError, match="sm_90"):
        gpu_by_name("sm_1")
