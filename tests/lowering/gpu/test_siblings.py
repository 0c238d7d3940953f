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
    ],
)
def test_bit_for_bit(name, rows, K, M, bias):
    layer, inputs = Siblings(rows, K, "e2m1", bias), (e2m1(M, K), torch.rand(M, 1))
    for part, expected in zip(launched(layer, inputs, name), layer(*inputs), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("name", "format"), [("sm_90", "e2m1|e1m2"), ("sm_120", "e2m1")], ids=["int8", "nvfp4"]
)
def test_blocks(name, format):
    M, K = 20, 96
    layer = Siblings((40, 24), K, format, True, block_size=32)
    inputs = (e2m1(M, K), block_scales(M, K // 32, layer.outer))
    for part, expected in zip(launched(layer, inputs, name), layer(*inputs), strict=True):
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=tolerance)


def gemms(name):
    layer, inputs = Siblings((256, 64, 64), 512, "e2m1", False), (e2m1(200, 512), None)
    return gemm_kernels(layer, inputs, name)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_loads_stay_wide(name):
    (kernel,) = gemms(name)
    assert "cp.async.cg.shared.global" in kernel.assembly
    assert kernel.local_memory == 0


def test_amd_has_a_kernel_of_each():
    assert sum("_tem_" in kernel.name for kernel in gemms("gfx942")) >= 2  # two are of one shape
