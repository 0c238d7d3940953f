"""Compiling a quantized model: the report, the backend, and what the model then computes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.compile import compile_model

DATA = [tokens(seed=1), tokens(seed=2)]


@pytest.fixture(scope="module")
def eager() -> nn.Module:
    return fp4compile.quantize(tiny_llama(layers=1), DATA, progress=False)


@pytest.fixture(scope="module")
def compiled(eager) -> nn.Module:
    return compile_model(copy.deepcopy(eager))


def test_the_report_names_every_kernel(compiled):
    kernels = compiled.fp4_report.kernels
    assert len(kernels) == 8
    assert all(choice.problem for choice in kernels.values())


def test_a_kernel_that_falls_back_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        model = fp4compile.quantize(
            tiny_llama(),
            DATA,
            "w6a6",
            method="minmax",
            targets=["*.0.mlp.down_proj"],
            progress=False,
        )
        compile_model(model)
    (choice,) = model.fp4_report.kernels.values()
    assert choice.is_reference
    assert "6 bits" in choice.reason
    assert choice.reason in caplog.text


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("backend", ["fp4compile", "inductor"])
def test_torch_compile_takes_quantized_models(backend):
    x = torch.randn(5, 16)
    model = fp4compile.quantize(Linears(), [x], progress=False)
    expected = model(x)
    fp4compile.load_lowerings()
    got = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(x)
    assert torch.equal(got, expected)


def test_blocks_and_rotation_compile_to_kernels():
    model = fp4compile.quantize(tiny_llama(layers=1), DATA, method="best", progress=False)
    rotations = [site.rotation for site in model.fp4_report.sites]
    assert max(rotations) > 1
    ids = tokens(3, 7)
    expected = model(ids).logits
    got = compile_model(model)(ids).logits
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    assert not any(choice.is_reference for choice in model.fp4_report.kernels.values())


def test_quantize_and_compile_returns_the_same_model():
    model = Linears()
    x = torch.randn(5, 16)
    assert fp4compile.quantize_and_compile(model, [x], progress=False) is model
    assert model(x).shape == (5, 8)
    assert model.fp4_report.kernels
