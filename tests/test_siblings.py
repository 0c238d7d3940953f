"""Linears of one activation become one call in Dynamo's graph, unless it would change results."""

from __future__ import annotations

import pytest
import torch
from models import NormThenLinears
from torch import nn

import fp4compile
from fp4compile.siblings import linear_siblings, merge_siblings
from fp4compile.tensor import FP4Tensor

SPECS = {
    "w4a4": fp4compile.QuantSpec.preset("w4a4"),
    "w4a16": fp4compile.QuantSpec.preset("w4a16"),
    "best": fp4compile.QuantSpec(
        *[fp4compile.TensorSpec(4, ("e2m1",), "block", block_size=16) for _ in range(3)]
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def quantized(spec: str) -> NormThenLinears:
    torch.manual_seed(0)
    model = NormThenLinears()
    fp4compile.quantize(
        model, [torch.randn(64, 4, 32)], SPECS[spec], method="minmax", progress=False
    )
    return model


def merged_calls(function, x) -> tuple[torch.Tensor, int]:
    """The result of the rewritten graph, run eagerly, and how many merged calls it has."""
    counts = []

    def backend(graph, inputs):
        graph = merge_siblings(graph, inputs)
        counts.append(len(graph.graph.find_nodes(op="call_function", target=linear_siblings)))
        return graph.forward

    with torch.no_grad():
        return torch.compile(function, backend=backend)(x), sum(counts)


@pytest.mark.parametrize("spec", SPECS)
def test_siblings_are_one_call_and_the_same_bits(spec):
    model, x = quantized(spec), torch.randn(6, 5, 32)
    result, calls = merged_calls(model, x)
    assert calls == 1
    with torch.no_grad():
        assert torch.equal(result, model(x))


def test_another_scale_is_another_activation():
    model, x = quantized("w4a4"), torch.randn(6, 5, 32)
    model.up.weight.activation_scale = model.up.weight.activation_scale * 2
    result, calls = merged_calls(model, x)
    assert calls == 0
    with torch.no_grad():
        assert torch.equal(result, model(x))


def test_an_activation_written_in_between_is_read_twice():
    model, x = quantized("w4a4"), torch.randn(6, 5, 32)

    def run(x):
        x = x + 0
        gate = model.gate(x)
        x.mul_(2)
        return gate + model.up(x)

    result, calls = merged_calls(run, x)
    assert calls == 0
    with torch.no_grad():
        assert torch.equal(result, run(x))


def test_the_op_is_one_linear_per_weight():
    model = quantized("w4a4")
    weights = [model.gate.weight, model.up.weight]
    assert all(isinstance(weight, FP4Tensor) for weight in weights)
    x, biases = torch.randn(3, 32), [model.gate.bias, model.up.bias]
    for part, weight, bias in zip(
        linear_siblings(x, weights, biases), weights, biases, strict=True
    ):
        assert torch.equal(part, nn.functional.linear(x, weight, bias))


@pytest.mark.slow  # compiles C++
def test_inductor_takes_the_rewritten_graph():
    model, x = quantized("w4a4"), torch.randn(6, 5, 32)
    lowering = fp4compile.load_lowerings()

    def backend(graph, inputs):
        return lowering.compile_graph(merge_siblings(graph, inputs), list(inputs), None, {})

    with torch.no_grad():
        result = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
