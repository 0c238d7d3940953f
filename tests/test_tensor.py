"""The quantized weight behaves like the parameter that it replaced."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp4compile.errors import UnsupportedOperationError
from fp4compile.formats import by_name
from fp4compile.numerics import scale_for_max
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.qparams import ActivationQParams, SiteQParams, WeightQParams
from fp4compile.search.candidates import blocked_weight
from fp4compile.tensor import FP4Tensor


def quantized(
    rows: int = 6, columns: int = 10, *, transposed: bool = False, activation: bool = True
) -> FP4Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    scale = scale_for_max(weight.abs().amax(dim=1), by_name("e2m1"))
    shift = torch.randint(0, 4, (columns,), dtype=torch.int8)
    act = ActivationQParams("e2m1", "tensor", torch.tensor(0.05), shift) if activation else None
    decision = SiteQParams(WeightQParams("e2m1", scale), act, 0.0, 0.0)
    return fp4_weight(weight, decision, torch.float32, transposed=transposed)


def blocked() -> FP4Tensor:
    torch.manual_seed(0)
    weight = torch.randn(6, 10)
    decision = SiteQParams(blocked_weight(weight, (by_name("e2m1"),), 4), None, 0.0, 0.0)
    return fp4_weight(weight, decision, torch.float32)


def layer() -> nn.Linear:
    linear = nn.Linear(10, 6).requires_grad_(False)
    linear.weight = nn.Parameter(quantized(), requires_grad=False)
    return linear


X = torch.linspace(-2, 2, 30).view(3, 10)


def test_weight_only_linear_is_the_dequantized_one():
    weight = quantized(activation=False)
    torch.testing.assert_close(F.linear(X, weight), X @ weight.dequantize().t())


def test_every_way_to_multiply_gives_the_same():
    weight, bias = quantized(), torch.randn(6)
    expected = weight.linear(X, None)
    assert torch.equal(F.linear(X, weight), expected)
    assert torch.equal(X @ weight.t(), expected)
    assert torch.equal(torch.mm(X, weight.t()), expected)
    assert torch.equal(torch.matmul(X, quantized(transposed=True)), expected)
    assert torch.equal(torch.addmm(bias, X, weight.t()), weight.linear(X, bias))
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(F.linear(X, weight), expected)


@pytest.mark.parametrize("block", [False, True])
def test_rows_are_weights_of_their_own(block):
    weight = blocked() if block else quantized()
    whole = weight.linear(X, None)
    first, rest = weight.split((2, 4))
    assert torch.equal(torch.cat((first.linear(X, None), F.linear(X, rest)), dim=-1), whole)
    assert torch.equal(torch.cat([F.linear(X, part) for part in weight.chunk(3)], dim=-1), whole)
    assert torch.equal(F.linear(X, weight[1:-1]), whole[:, 1:-1])
    assert torch.equal(weight[4:].dequantize(), weight.dequantize()[4:])
    with pytest.raises(UnsupportedOperationError, match="only rows"):
        weight.split(5, dim=1)
    with pytest.raises(UnsupportedOperationError, match="only rows"):
        weight.t()[:2]


def test_embedding_looks_up_dequantized_rows():
    weight, rows = quantized(), torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(F.embedding(rows, weight), weight.dequantize()[rows])


def test_deepcopy_state_dict_and_weights_only_file_are_bit_exact():
    original = layer()
    expected = original(X)
    assert torch.equal(copy.deepcopy(original)(X), expected)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    other = layer()
    other.weight.packed_weight.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), expected)


def test_loading_a_different_format_is_refused():
    other = copy.deepcopy(layer())
    state = layer().state_dict()
    state["weight"] = state["weight"].with_attributes(weight_format="e1m2")
    with pytest.raises((UnsupportedOperationError, RuntimeError), match="same format"):
        other.load_state_dict(state)


def test_dtype_changes_are_logical():
    model = layer().to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.packed_weight.dtype == torch.uint8
    assert model.weight.weight_scale.dtype == torch.float32
    assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_unsupported_operations_say_what_to_do():
    with pytest.raises(UnsupportedOperationError, match="dequantize"):
        quantized() + 1
    with pytest.raises(UnsupportedOperationError, match=r"\[N, K\]"):
        F.linear(X, quantized(transposed=True))
    with pytest.raises(UnsupportedOperationError, match="max_norm"):
        F.embedding(torch.tensor([0]), quantized(), max_norm=1.0)


def test_export_sees_the_ops():
    exported = torch.export.export(layer(), (X,), strict=False)
    targets = {node.target for node in exported.graph.nodes}
    assert {torch.ops.fp4.linear.default, torch.ops.fp4.quantize_activation.default} <= targets
    assert torch.equal(exported.module()(X), layer()(X))


def test_compiles_without_graph_break_to_the_same_bits():
    model = layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), model(X))
