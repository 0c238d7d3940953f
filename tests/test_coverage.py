"""verify() reads the generated code: what serves each weight, and what breaks the contract."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.compile import compile_model
from fp4compile.errors import CompileError
from fp4compile.lowering.config import config

DATA = [tokens(seed=1)]
X = torch.randn(5, 32)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model = fp4compile.quantize(tiny_llama(), DATA, method="minmax", progress=False)
    return compile_model(model)


def test_every_site_has_a_kernel(llama):
    coverage = fp4compile.verify(llama, strict=True)
    assert {site.name for site in coverage.sites} == {site.name for site in llama.fp4_report.sites}
    assert not coverage.failures
    targets = {choice.target for choice in llama.fp4_report.kernels.values()}
    for site in coverage.sites:
        looked_up = site.name == "model.embed_tokens.weight"
        assert set(site.kernels) - {"inductor"} <= targets
        assert ("inductor" in site.kernels) == looked_up
        assert site.activation_format
    # The residual is added to the tile that a GEMM has just made.
    epilogues = {site.name.split(".")[-2]: site.epilogues for site in coverage.sites}
    assert any("add" in names for names in epilogues["down_proj"])
    assert "0 against the contract" in coverage.summary()


def test_weights_that_were_merged_are_served_by_one_call(llama):
    (program,) = llama._compiled_call_impl.generated
    attention = llama.model.layers[0].self_attn
    calls = [program.of(getattr(attention, f"{name}_proj").weight) for name in "qkv"]
    assert calls[0] == calls[1] == calls[2]
    assert len(calls[0]) == 1
    assert calls[0] != program.of(attention.o_proj.weight)


def test_a_copy_is_not_compiled(llama):
    copied = copy.deepcopy(llama)
    with pytest.raises(CompileError, match="compile_model"):
        fp4compile.verify(copied)


def test_code_from_a_cache_says_the_same(llama):
    before = fp4compile.verify(llama)
    torch.compiler.reset()
    again = fp4compile.verify(compile_model(llama))
    assert again.sites == before.sites


@pytest.mark.parametrize("programs", [True, False], ids=["program", "dynamo"])
def test_quantize_and_compile_logs_the_summary(caplog, programs):
    options = {"method": "minmax", "ignore": ["down.weight"], "progress": False}
    options["programs"] = programs
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        model = fp4compile.quantize_and_compile(NormThenLinears(), [X], "w4a16", **options)
    coverage = fp4compile.verify(model, strict=True)
    assert coverage.summary() in caplog.text
    assert "2 FP4 weights in 1 graphs" in caplog.text
    assert coverage.high_precision == {"down.weight": "in ignore"}


def test_the_reference_is_against_the_contract(monkeypatch):
    monkeypatch.setattr(config, "cpu_target", "reference")
    model = fp4compile.quantize(NormThenLinears(), [X], method="minmax", progress=False)
    compile_model(model)
    coverage = fp4compile.verify(model, X)
    assert [site.kernels for site in coverage.sites] == [("reference",)] * 3
    with pytest.raises(CompileError, match="forced") as caught:
        fp4compile.verify(model, strict=True)
    assert "down.weight" in str(caught.value)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = NormThenLinears(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_weight_that_nobody_asked_to_leave_out_is_against_the_contract():
    model = fp4compile.quantize(Unused(), [X], "w4a16", method="minmax", progress=False)
    with pytest.raises(CompileError, match=r"unused\.weight: not used"):
        fp4compile.verify(compile_model(model), strict=True)


def test_a_model_that_is_not_compiled_is_refused():
    model = fp4compile.quantize(NormThenLinears(), [X], method="minmax", progress=False)
    with pytest.raises(CompileError, match="compile_model"):
        fp4compile.verify(model)
