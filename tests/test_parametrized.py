"""Parametrized weights are computed once and quantized; what is not, and a failure, keep theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fp4compile
from fp4compile.errors import NonFiniteError
from fp4compile.tensor import FP4Tensor


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 32)),
        nn.ReLU(),
        parametrizations.orthogonal(nn.Linear(32, 32)),
        parametrizations.weight_norm(nn.Linear(32, 8)),
    )


def plain(parametrized: nn.Module) -> nn.Module:
    for module in parametrized.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return parametrized


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, 16, generator=generator) for _ in range(2)]


def test_computed_weights_are_quantized_as_plain_ones_are() -> None:
    got = fp4compile.quantize(model(), batches(), progress=False)
    expected = fp4compile.quantize(plain(model()), batches(), progress=False)
    assert isinstance(got[0].weight, FP4Tensor)
    assert not any(parametrize.is_parametrized(module) for module in got.modules())
    x = batches()[0]
    assert torch.equal(got(x), expected(x))


def test_what_is_left_out_stays_parametrized() -> None:
    reference = model()
    got = fp4compile.quantize(model(), batches(), ignore=["3.*"], progress=False)
    assert parametrize.is_parametrized(got[3], "weight")
    assert not parametrize.is_parametrized(got[0])
    assert torch.equal(got[3].weight, reference[3].weight)


def test_a_failure_leaves_the_parametrizations() -> None:
    failing = model()
    before, kinds = copy.deepcopy(failing.state_dict()), [type(m) for m in failing.modules()]
    with pytest.raises(NonFiniteError):
        fp4compile.quantize(failing, [torch.full((4, 6, 16), torch.nan)], progress=False)
    assert [type(m) for m in failing.modules()] == kinds
    after = failing.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    failing[0].parametrizations.weight.original0.data.mul_(2)  # what the weight is computed from
    assert torch.equal(failing[0].weight, 2 * plain(model())[0].weight)
