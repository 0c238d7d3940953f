"""Sorting channels by exponent shift changes a weight's layout and nothing that it computes."""

from __future__ import annotations

import pytest
import torch
from models import NormThenLinears
from torch import nn

import fp4compile
from fp4compile.channel_order import channel_order, in_order
from fp4compile.errors import UnsupportedOperationError
from fp4compile.integrations.serialize import flattened, restored
from fp4compile.operand import SHIFT_BLOCK, ordered, unordered
from fp4compile.tensor import FP4Tensor

E2M1 = fp4compile.QuantSpec(
    fp4compile.TensorSpec(4, ("e2m1",)),
    fp4compile.TensorSpec(4, ("e2m1",), granularity="tensor", exponent_shift=True),
    None,
)


@pytest.fixture
def model() -> nn.Module:
    """E2M1 times E2M1 with the exponent shifts of four channels out of five in the operand."""
    torch.manual_seed(0)
    made, x = NormThenLinears(), torch.randn(64, 4, 32)
    fp4compile.quantize(made, [x], E2M1, method="minmax", progress=False)
    shifts = {}
    for weight in weights(made):
        key = weight.activation_scale.data_ptr()
        shift = torch.arange(weight.reduction).remainder(5).clamp(max=3).to(torch.int8)
        weight.exponent_shift = shifts.setdefault(key, shift)
        weight.shift_in_weight = weight.shift_folded = False
    return made


def weights(model: nn.Module) -> list[FP4Tensor]:
    return [weight for weight in model.parameters() if isinstance(weight, FP4Tensor)]


def test_an_order_holds_every_channel_once_in_blocks_of_one_shift():
    shift = torch.randint(0, 4, (200,), dtype=torch.int8)
    order = channel_order(shift)
    assert sorted(order[order < 200].tolist()) == list(range(200))
    assert len(order) < 200 + 4 * SHIFT_BLOCK
    for block in order.view(-1, SHIFT_BLOCK):
        assert len(shift[block[block < 200].long()].unique()) == 1
    x = torch.randn(3, 200)
    assert torch.equal(unordered(ordered(x, order), order, 200), x)


def test_a_model_computes_the_same_bits(model):
    x, before = torch.randn(6, 5, 32), [weight.dequantize() for weight in weights(model)]
    with torch.no_grad():
        expected = model(x)
        assert fp4compile.order_channels(model) == {}
        assert torch.equal(model(x), expected)
    for weight, dense in zip(weights(model), before, strict=True):
        assert weight.operand_shift_block == SHIFT_BLOCK
        assert weight.codes % SHIFT_BLOCK == 0
        assert torch.equal(weight.dequantize(), dense)
    # A second time there is nothing left to do.
    assert set(fp4compile.order_channels(model).values()) == {"they are sorted already"}


def test_siblings_keep_one_activation(model):
    fp4compile.order_channels(model)
    gate, up, _ = weights(model)
    assert torch.equal(gate.channel_order, up.channel_order)


@pytest.mark.slow
def test_compiled_on_the_cpu(model):
    x = torch.randn(6, 5, 32)
    fp4compile.order_channels(model)
    expected = model(x)
    torch.testing.assert_close(fp4compile.compile_model(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_restored(model):
    fp4compile.order_channels(model)
    weight = weights(model)[0]
    parts = {name.rpartition(".")[2]: part for name, part in flattened({"w": weight}).items()}
    attributes = {name: getattr(weight, name) for name in FP4Tensor.ATTRIBUTES}
    again = restored("w", parts, attributes, weight.dtype)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_rows_are_looked_up_in_the_channels_order(model):
    weight = weights(model)[0]
    indices = torch.tensor([[0, 3], [5, 1]])
    expected = weight.lookup(indices)
    again = in_order(weight, channel_order(weight.exponent_shift))
    assert torch.equal(again.lookup(indices), expected)


def test_what_has_no_shifts_is_left_alone():
    model, x = NormThenLinears(), torch.randn(64, 4, 32)
    fp4compile.quantize(model, [x], "w4a16", method="minmax", progress=False)
    assert set(fp4compile.order_channels(model).values()) == {"its operand has no exponent shifts"}
    with pytest.raises(UnsupportedOperationError, match="no exponent shifts"):
        in_order(weights(model)[0], torch.arange(32))
