"""fp4::linear as the GPU's own code computes it, in Triton's interpreter, against the eager op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp4compile import lowering
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS

SIZES = {  # N, K: multiples of the tiles, tails, odd K, K split among programs
    "even": (64, 512),
    "tails": (70, 200),
    "odd": (67, 131),
    "tiny": (1, 1),
    "split": (40, 1040),
}
GPU = GPUS["sm_90"]


def interpreted(*arguments, **options):
    from fp4compile.lowering.testing import interpret

    return interpret(*arguments, GPU, **options)


@pytest.mark.parametrize(
    ("size", "format", "granularity", "bias", "M"),
    [
        ("even", "e2m1", "token", False, 7),
        ("tails", "e3m0", "token", True, 33),
        ("odd", "e2m1", "tensor", True, 150),
        ("tiny", "e1m2", "tensor", False, 1),
        ("split", "e3m0", "token", True, 5),
        ("split", "e2m1", None, False, 1),
    ],
)
def test_int8_route_is_exact(layer, int8_operand, size, format, granularity, bias, M):
    N, K = SIZES[size]
    linear = layer(N, K, format, bias)
    scale = {"token": torch.rand(M, 1), "tensor": torch.tensor(0.37), None: None}[granularity]
    inputs = (int8_operand(M, K), scale)
    assert torch.equal(interpreted(linear, inputs, dynamic=True), linear(*inputs))
    (choice,) = SEEN
    assert choice.target == "triton_int8"


@pytest.mark.parametrize(
    ("size", "format", "dtype", "M", "assembly"),
    [
        ("tails", "e2m1", torch.bfloat16, 9, True),
        ("tails", "e3m0", torch.bfloat16, 9, False),
        ("odd", "e3m0", torch.float32, 20, True),
        ("even", "e1m2", torch.float16, 100, True),
        ("split", "e2m1", torch.bfloat16, 2, True),
    ],
)
def test_weight_only_route(layer, size, format, dtype, M, assembly, monkeypatch):
    monkeypatch.setattr(lowering.config, "gpu_assembly", assembly)
    N, K = SIZES[size]
    linear, x = layer(N, K, format, True), torch.randn(M, K).to(dtype)
    torch.testing.assert_close(
        interpreted(linear, (x,), dynamic=True), linear(x), rtol=1e-5, atol=1e-5 * K**0.5 * 64
    )
    (choice,) = SEEN
    assert choice.target == "triton_float"


def test_assembly_and_arithmetic_are_one_function(layer, int8_operand, monkeypatch):
    from fp4compile.lowering.testing import interpret_with_sources

    linear, inputs = layer(32, 64, "e3m0"), (int8_operand(3, 64), None)
    results = []
    for assembly in (True, False):
        monkeypatch.setattr(lowering.config, "gpu_assembly", assembly)
        result, (source,) = interpret_with_sources(linear, inputs, GPU)
        assert f"DECODE_PTX : tl.constexpr = {assembly}" in source
        results.append(result)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_epilogue_is_in_the_kernel(layer, int8_operand, dtype):
    from fp4compile.lowering.testing import interpret_with_sources

    linear = layer(70, 64, bias=True, dtype=dtype)

    def run(operand, scale, gate, residual):
        return torch.nn.functional.silu(linear(operand, scale)) * gate + residual

    inputs = (
        int8_operand(2, 20, 64),
        torch.rand(2, 20, 1) * 1e-3,
        torch.randn(2, 20, 70).to(dtype),
        torch.randn(2, 20, 70).to(dtype),
    )
    result, (source,) = interpret_with_sources(run, inputs, GPU, dynamic=True)
    assert source.count("@triton.jit") == 1
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(result, run(*inputs), rtol=tolerance, atol=tolerance)


def test_what_no_kernel_serves_falls_back_with_reasons(layer):
    linear, x = layer(9, 16), torch.randn(3, 16)
    from fp4compile.lowering.testing import compile_for

    (graph,) = compile_for(linear, (x,), replace(GPU, name="sm_75", capability=75))
    assert "torch.ops.fp4.linear" in graph.source
    (choice,) = SEEN
    assert choice.is_reference
    assert "triton_float: sm_75 was not tried" in choice.reason
