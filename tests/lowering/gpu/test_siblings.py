"""Several weights in one GEMM: columns of tiles that lie in two of them, scales, split K."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.blocks import block_count
from fp4compile.formats import by_name
from fp4compile.lowering.gpus import GPUS
from fp4compile.packing import pack

E2M1 = torch.tensor(by_name("e2m1").integer_values, dtype=torch.int8)


class Siblings(nn.Module):
    """``fp4::linears`` of three weights; with blocks each has an outer scale of its own."""

    def __init__(self, rows, K, format, bias, block_size=0):
        super().__init__()
        for i, N in enumerate(rows):
            self.register_buffer(f"packed{i}", pack(torch.randint(0, 16, (N, K)).byte(), 4))
            self.register_buffer(f"scale{i}", torch.rand(1 if block_size else N) + 0.1)
            self.register_buffer(f"bias{i}", torch.randn(N))
            if block_size:
                codes = torch.randint(1, 127, (N, block_count(K, block_size))).byte()
                self.register_buffer(f"block{i}", codes)
        self.outer = nn.Buffer(torch.tensor(0.05)) if block_size else None
        self.count, self.format, self.bias, self.block_size = len(rows), format, bias, block_size

    def forward(self, operand, operand_scale):
        def each(name):
            return [getattr(self, f"{name}{i}") for i in range(self.count)]

        return torch.ops.fp4.linears(
            operand,
            operand_scale,
            each("packed"),
            each("scale"),
            each("bias") if self.bias else [],
            self.format,
            torch.float32,
            each("block") if self.block_size else [],
            self.block_size,
            "e2m1",
            self.outer,
        )


def e2m1(*shape):
    return E2M1[torch.randint(0, 16, shape)]


def launched(layer, inputs, name):
    from fp4compile.lowering.testing import interpret_with_sources

    result, (source,) = interpret_with_sources(layer, inputs, GPUS[name], dynamic=True)
    assert source.count("async_compile.triton('triton_tem") == 1
    return result


@pytest.mark.parametrize(
    ("name", "rows", "K", "M", "bias"),
    [
        ("sm_90", (70, 30, 31), 200, 70, True),
        ("sm_90", (40, 24, 24), 1040, 3, True),  # K is split
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
    codes = torch.randint(1, 127, (M, K // 32)).byte()
    inputs = (e2m1(M, K), codes.view(torch.float8_e4m3fn).float() * layer.outer)
    for part, expected in zip(launched(layer, inputs, name), layer(*inputs), strict=True):
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=tolerance)


def gemms(name):
    from fp4compile.lowering.testing import compile_for

    layer, inputs = Siblings((256, 64, 64), 512, "e2m1", False), (e2m1(200, 512), None)
    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=True)
    return [kernel for kernel in graph.kernels if "_tem_" in kernel.name]


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_loads_stay_wide(name):
    (kernel,) = gemms(name)
    assert "cp.async.cg.shared.global" in kernel.assembly
    assert kernel.local_memory == 0


def test_amd_has_a_kernel_of_each():
    assert sum("_tem_" in kernel.name for kernel in gemms("gfx942")) >= 2  # two are of one shape
