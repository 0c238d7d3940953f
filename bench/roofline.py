"""GPU kernels on paper: bytes and operations over datasheet rates, occupancy as compiled.

Nothing here is measured. A bound is what no kernel of this design can beat on that GPU; how near
one comes only a run on the GPU tells (``python -m bench gemm --device cuda``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fp4compile.compile import load_lowerings
from fp4compile.lowering.gpus import GPUS, Gpu
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import triton_int8
from fp4compile.lowering.targets.triton_gemm import (
    MANY_COLUMNS,
    MANY_ROWS,
    ROW_CLASSES,
    Tile,
    row_class,
)

# (model and layer, N, K)
LAYERS = (
    ("SmolLM2-135M gate", 1536, 576),
    ("Llama-3.1-8B q, o", 4096, 4096),
    ("Llama-3.1-8B gate", 14336, 4096),
    ("Llama-3.1-8B down", 4096, 14336),
)
ROWS = (1, 16, 256, 4096)
# Resources depend on the tile, hardly on the size; small ones compile and run faster.
_FEW_N, _COMPILED_K = 256, 2048
# The fewest rows of each class.
_FEWEST = dict(
    zip((*ROW_CLASSES, MANY_ROWS), (1, *(most + 1 for most in ROW_CLASSES)), strict=True)
)


@dataclass(frozen=True)
class Bound:
    """``y[M, N] = x[M, K] w[N, K]^T`` with int8 operand, 4-bit weight and bfloat16 result.

    ``bfloat16_seconds`` is the bound of the same layer with 16-bit weights and activations.
    ``waves``: programs over how many the GPU holds at a time.
    """

    gpu: str
    layer: str
    M: int
    N: int
    K: int
    memory_seconds: float
    compute_seconds: float
    bfloat16_seconds: float
    registers: int
    shared_memory: int
    programs_per_multiprocessor: int
    waves: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def limit(self) -> str:
        return "memory" if self.memory_seconds >= self.compute_seconds else "tensor cores"


def run(names: Sequence[str], rows: Sequence[int] = ROWS) -> Iterator[Bound]:
    """Bounds of every layer and M on the GPUs of those names."""
    load_lowerings()
    for name in names:
        for layer, N, K in LAYERS:
            for M in rows:
                yield bound(GPUS[name], layer, M, N, K)


def bound(gpu: Gpu, layer: str, M: int, N: int, K: int) -> Bound:
    problem, rows = _problem(gpu, N, K), row_class(lambda most: most >= M)
    tile = triton_int8.TARGET.for_rows(problem, rows).tile(problem, rows)
    registers, shared = _resources(gpu.name, N >= MANY_COLUMNS, rows)
    resident = _resident(gpu, tile, registers, shared)
    programs = -(-M // tile.block_m) * -(-N // tile.block_n) * tile.split_k
    return Bound(
        gpu.name,
        layer,
        M,
        N,
        K,
        memory_seconds(gpu, M, N, K),
        compute_seconds(gpu, M, N, K),
        max(2 * (N * K + M * K + M * N) / gpu.bandwidth, 2 * M * N * K / gpu.rates["bf16"]),
        registers,
        shared,
        resident,
        programs / (resident * gpu.multiprocessors),
    )


def memory_seconds(gpu: Gpu, M: int, N: int, K: int) -> float:
    """Codes, scales and operand once from memory, a result of 16 bits to it."""
    return (N * K / 2 + 4 * N + M * K + 4 * M + 2 * M * N) / gpu.bandwidth


def compute_seconds(gpu: Gpu, M: int, N: int, K: int) -> float:
    """All products on the int8 tensor cores at their peak."""
    return 2 * M * N * K / gpu.rates["int8"]


def _resident(gpu: Gpu, tile: Tile, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time."""
    threads = tile.num_warps * gpu.warp
    by_shared = gpu.shared_memory // shared if shared else gpu.threads
    return max(1, min(gpu.registers // (registers * threads), by_shared, gpu.threads // threads))


def _problem(gpu: Gpu, N: int, K: int) -> GemmProblem:
    return GemmProblem(
        N, K, "e2m1", torch.int8, "token", 0, False, torch.bfloat16, "cuda", gpu.name
    )


class _Linear(nn.Module):
    def __init__(self, N: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(N, _COMPILED_K // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(N))

    def forward(self, operand: Tensor, operand_scale: Tensor) -> Tensor:
        linear: Tensor = torch.ops.fp4.linear(
            operand, operand_scale, self.packed, self.scale, None, "e2m1", torch.bfloat16
        )
        return linear


@cache
def _resources(name: str, many_columns: bool, rows: int) -> tuple[int, int]:
    """Registers per thread and shared memory per program of the compiled kernel."""
    from fp4compile.lowering.testing import compile_for

    M = _FEWEST[rows]
    inputs = (torch.zeros(M, _COMPILED_K, dtype=torch.int8), torch.ones(M, 1))
    layer = _Linear(MANY_COLUMNS if many_columns else _FEW_N)
    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=True)
    kernel = next(kernel for kernel in graph.kernels if "_tem_" in kernel.name)
    return kernel.registers, kernel.shared_memory


def markdown(bounds: Sequence[Bound]) -> str:
    """The table of a document."""
    lines = [
        "| GPU | layer | N x K | M | bound (us) | limit | bf16 bound (us) | registers |"
        " shared (KiB) | per SM | waves |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for b in bounds:
        lines.append(
            f"| {b.gpu} | {b.layer} | {b.N} x {b.K} | {b.M} | {b.seconds * 1e6:.1f} | {b.limit} "
            f"| {b.bfloat16_seconds * 1e6:.1f} | {b.registers} | {b.shared_memory / 1024:.0f} "
            f"| {b.programs_per_multiprocessor} | {b.waves:.2f} |"
        )
    return "\n".join(lines)
