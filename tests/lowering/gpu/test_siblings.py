"""Several weights in one GEMM: columns of tiles that lie in two of them, scales, few rows."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import Siblings, block_scales, e2m1, gemm_kernels, launched


@pytest.mark.parametrize(
    ("name", "rows", "K", "M", "bias"),
    [
        ("sm_90", (70, 30, 31), 200, 70, True),
        ("sm_90", (40, 24, 24), 1040, 3, True),  # few rows
        ("sm_100", (100, 40, 20), 128, 5, False),
        ("gfx942", (70, 30, 31), 200, 70, True),
        ("gfx950", (40, 24, 24), 1040, 3, True),
    ],
)
def test_bit_for_bit(name, rows, K, M, bias):
    layer, inputs = Siblings(rows, K, "e2m1", bias), (e2m1(M, K), torch.rand(M, 1))
    for part, expected in zip(launched(layer, inputs, name), layer(*inputs), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("name", "format"),
    [("sm_90", "e2m1|e1m2"), ("sm_120", "e2m1"), ("gfx942", "e2m1|e1m2")],
    ids=["int8", "nvfp4", "amd"],
)
def test_blocks(name, format):
    M, K = 20, 96
    layer = Siblings((40, 24), K, format, True, block_size=32)
    inputs = (e2m1(M, K), block_scales(M, K // 32, layer.outer))
    for part, expected in zip(launched(layer, inputs, name), layer(*inputs), strict=True):
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "wide_load"),
    [
        ("sm_80", "cp.async.cg.shared.global"),
        ("sm_90", "cp.async.cg.shared.global"),
        ("gfx942", "global_load_dwordx4"),
        ("gfx950", "global_load_dwordx4"),
    ],
)
def test_one_gemm_whose_loads_stay_wide(name, wide_load):
    layer, inputs = Siblings((256, 64, 64), 512, "e2m1", False), (e2m1(200, 512), None)
    (kernel,) = gemm_kernels(layer, inputs, name)
    assert wide_load in kernel.assembly
    assert "load_ubyte" not in kernel.assembly
    assert kernel.local_memory == 0
