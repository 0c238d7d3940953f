"""Tiles that a user may have measured beside the one that is chosen; none spills registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from gpu_layers import gemm_kernels
from torch._inductor import config as inductor_config

from fp4compile.lowering.gpus import GPUS
from fp4compile.lowering.targets.triton_gemm import Tile, candidates

TILES = (
    Tile(1, 8, 128, num_warps=8, num_stages=1),
    Tile(16, 16, 128, num_warps=4, num_stages=4, slices=4),
    Tile(128, 64, 128, num_warps=4, num_stages=4),
    Tile(128, 128, 64, num_warps=8, num_stages=2, split_k=2),
)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("operand_bytes", [1, 2, 4])
def test_neighbours_fit(tile, gpu, operand_bytes):
    first, *others = candidates(tile, operand_bytes, gpu.shared_memory)
    assert first == tile
    assert len({first, *others}) == 1 + len(others)
    for other in others:
        assert other.split_k == tile.split_k  # which the layout of the result depends on
        assert 1 <= other.num_warps <= 8
        step = (other.block_m + other.block_n) * other.block_k * other.slices * operand_bytes
        assert step * other.num_stages <= gpu.shared_memory


@contextmanager
def choosing(number: int) -> Iterator[list[int]]:
    """Inductor, asked to measure, takes that choice; yields how many there were."""
    from fp4compile.lowering import inductor_gpu

    counts = []
    select = inductor_gpu.autotune_select_algorithm

    def choose(name, choices, *args):
        counts.append(len(choices))
        return select(name, [choices[number]], *args)

    with patch.object(inductor_gpu, "autotune_select_algorithm", choose):
        yield counts


@pytest.mark.parametrize(("name", "rows"), [("sm_80", 300), ("gfx942", 8)])
def test_none_spills(layer, int8_operand, name, rows):
    linear, inputs = layer(4096, 1024), (int8_operand(rows, 1024), torch.rand(rows, 1))
    with choosing(0) as counts:
        gemm_kernels(linear, inputs, name)
    assert counts == [1]  # not asked to, it compiles one
    made, number = [], 0
    while not made or number < counts[0]:
        with inductor_config.patch(max_autotune_gemm=True), choosing(number) as counts:
            (kernel,) = gemm_kernels(linear, inputs, name)
        assert kernel.local_memory == 0
        made.append(kernel.assembly)
        number += 1
    assert len(set(made)) == len(made) > 3
