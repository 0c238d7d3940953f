"""The compiled model computes what the eager one computes, and compiles no more than it must."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn
from torch._dynamo.utils import counters

import fp4compile
from fp4compile.compile import compile_model
from fp4compile.lowering.config import config

DATA = [tokens(seed=1), tokens(seed=2)]


@pytest.fixture(scope="module")
def eager() -> nn.Module:
    return fp4compile.quantize(tiny_llama(layers=1), DATA, progress=False)


@pytest.fixture(scope="module")
def compiled(eager) -> nn.Module:
    """As programs; what Dynamo makes of models is tested in test_torch_compile.py."""
    torch.compiler.reset()
    counters.clear()
    model = compile_model(copy.deepcopy(eager))
    # Warm-up: one call of every kind that the tests make.
    with torch.no_grad():
        model(tokens(2, 9))
        for batch in (2, 3):
            model.generate(tokens(batch, 5), max_new_tokens=3, do_sample=False)
    return model


def test_forward_equals_eager_without_compiling_again(eager, compiled):
    before = programs(compiled)
    for batch, length in ((2, 9), (4, 24), (3, 17), (7, 2)):
        with torch.no_grad():
            got, expected = compiled(tokens(batch, length)), eager(tokens(batch, length))
        torch.testing.assert_close(got.logits, expected.logits, rtol=2e-2, atol=2e-2)
        agree = (got.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean()
        assert agree > 0.99
    assert programs(compiled) == before


def programs(compiled: nn.Module) -> int:
    return compiled._compiled_call_impl.programs


def test_generate_equals_eager_without_compiling_again(eager, compiled):
    before = programs(compiled)
    # Other batch sizes, other prompt lengths, more decode steps, a second prompt.
    for batch, length, steps in ((2, 5, 12), (4, 11, 6), (3, 7, 9)):
        prompt = tokens(batch, length, seed=batch)
        options = {"max_new_tokens": steps, "do_sample": False}
        assert torch.equal(compiled.generate(prompt, **options), eager.generate(prompt, **options))
    assert programs(compiled) == before


def test_decode_steps_are_repeated_natively(eager, compiled):
    prompt = tokens(2, 6)
    compiled.generate(prompt, max_new_tokens=5, do_sample=False)
    known = compiled._compiled_call_impl.by_kind.values()
    assert any(program.repeats for programs in known for program in programs)


def test_nothing_is_left_to_dynamo(compiled):
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_without_programs_dynamo_takes_all_calls_and_compiles_no_more(eager, monkeypatch):
    monkeypatch.setattr(config, "cpu_target", "cpp_portable")  # which compiles fastest
    torch.compiler.reset()
    counters.clear()
    model, graphs = compile_model(copy.deepcopy(eager), programs=False), []
    # First a batch that is no other size, since Dynamo takes equal sizes for the same.
    for batch, length, steps in ((5, 6, 4), (6, 11, 7), (3, 9, 3)):
        prompt, options = tokens(batch, length), {"max_new_tokens": steps, "do_sample": False}
        assert torch.equal(model.generate(prompt, **options), eager.generate(prompt, **options))
        graphs.append(counters["stats"]["unique_graphs"])
    # A prompt, the first step (the cache is as the prompt left it), and all others.
    assert graphs[0] == graphs[-1] <= 3
    assert not counters["graph_break"]


def test_the_report_names_every_kernel(compiled):
    kernels = compiled.fp4_report.kernels
    assert len(kernels) == 8
    assert all(choice.problem for choice in kernels.values())


def test_a_kernel_that_falls_back_says_so(caplog, monkeypatch):
    monkeypatch.setattr(config, "cpu_target", "reference")
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        model = fp4compile.quantize(
            tiny_llama(),
            DATA,
            method="minmax",
            targets=["*.0.mlp.down_proj"],
            progress=False,
        )
        compile_model(model)
    (choice,) = model.fp4_report.kernels.values()
    assert choice.is_reference
    assert "forced" in choice.reason
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
    got = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("preset", ["w6a6", "w8a8"])
def test_wider_weights_compile_to_kernels(preset):
    x = torch.randn(5, 16)
    model = fp4compile.quantize(Linears(), [x], preset, progress=False)
    expected = model(x)
    torch.testing.assert_close(compile_model(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(choice.is_reference for choice in model.fp4_report.kernels.values())


def test_blocks_and_rotation_compile_to_kernels():
    model = fp4compile.quantize(tiny_llama(layers=1), DATA, method="best", progress=False)
    rotations = [site.rotation for site in model.fp4_report.sites]
    assert max(rotations) > 1
    ids = tokens(3, 7)
    # The head sees a prompt's last position.
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, max_new_tokens=4, **options)
    got = compile_model(model).generate(ids, max_new_tokens=4, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=2e-2, atol=2e-2)
    assert not any(choice.is_reference for choice in model.fp4_report.kernels.values())


def test_quantize_and_compile_returns_the_same_model():
    model = Linears()
    x = torch.randn(5, 16)
    assert fp4compile.quantize_and_compile(model, [x], progress=False) is model
    assert model(x).shape == (5, 8)
    assert model.fp4_report.kernels


class Stream:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


VARIANTS = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 2, "do_sample": False},
    "static-cache": {"cache_implementation": "static", "do_sample": False},
    "dynamic-cache": {"cache_implementation": "dynamic", "do_sample": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_generate_gives_the_tokens_of_the_eager_model(eager, compiled, variant):
    options = {**VARIANTS[variant], "max_new_tokens": 6}
    prompt = tokens(3, 5, seed=4)
    outputs = []
    for model in (compiled, eager):
        torch.manual_seed(0)  # of the sampling
        outputs.append(model.generate(prompt, **options))
    assert torch.equal(*outputs)


@pytest.mark.slow  # a batch of one has graphs of its own
def test_streaming(eager, compiled):
    prompt, stream = tokens(1, 5, seed=4), Stream()
    got = compiled.generate(prompt, max_new_tokens=4, do_sample=False, streamer=stream)
    assert stream.tokens == got[0].tolist()
    assert stream.ended
    assert torch.equal(got, eager.generate(prompt, max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_an_fp4_draft_assists_a_full_precision_model(compiled):
    target = tiny_llama(layers=1)
    prompt = tokens(1, 5, seed=4)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = target.generate(prompt, **options)
    assert torch.equal(target.generate(prompt, assistant_model=compiled, **options), expected)
