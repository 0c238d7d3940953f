"""Programs compute what the eager model computes, once per kind of call and per kind of block."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.compile import compile_model
from fp4compile.program.dispatch import Dispatcher
from fp4compile.program.program import CompiledRegion
from fp4compile.program.regions import Region
from fp4compile.program.values import Flattened
from fp4compile.tensor import FP4Tensor

LAYERS = 3
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def eager() -> nn.Module:
    return fp4compile.quantize(
        tiny_llama(layers=LAYERS), [tokens()], method="minmax", progress=False
    )


def run_eagerly(region: Region, _: Any) -> CompiledRegion:
    """Inductor's part is tested in tests/lowering; here its place is taken by the graph itself."""
    module = torch.fx.GraphModule({}, region.graph)
    return CompiledRegion(lambda arguments: module(*arguments))


def with_programs(model: nn.Module) -> nn.Module:
    model = compile_model(copy.deepcopy(model))
    dynamo = model._compiled_call_impl._otherwise
    model._compiled_call_impl = Dispatcher(model, run_eagerly, dynamo)
    return model


@pytest.fixture(scope="module")
def compiled(eager: nn.Module) -> nn.Module:
    """Warmed up by one call of every kind that the tests make."""
    model = with_programs(eager)
    with torch.no_grad():
        model(tokens(2, 9))
        for batch in (1, 2):
            model.generate(tokens(batch, 5), max_new_tokens=3, **GREEDY)
    return model


@pytest.fixture
def no_new_programs(compiled: nn.Module):
    before = compiled._compiled_call_impl.programs
    yield
    assert compiled._compiled_call_impl.programs == before


@pytest.mark.usefixtures("no_new_programs")
@pytest.mark.parametrize(("batch", "length", "steps"), [(1, 5, 12), (1, 11, 3), (3, 7, 9)])
def test_generate_equals_eager(eager, compiled, batch, length, steps):
    prompt = tokens(batch, length, seed=batch)
    expected = eager.generate(prompt, max_new_tokens=steps, **GREEDY)
    assert torch.equal(compiled.generate(prompt, max_new_tokens=steps, **GREEDY), expected)


@pytest.mark.usefixtures("no_new_programs")
@pytest.mark.parametrize(("batch", "length"), [(4, 24), (3, 17), (7, 2)])
def test_forward_equals_eager(eager, compiled, batch, length):
    ids = tokens(batch, length)
    with torch.no_grad():
        got, expected = compiled(ids), eager(ids)
    assert type(got) is type(expected)
    torch.testing.assert_close(got.logits, expected.logits, rtol=2e-2, atol=2e-2)
    for layer, other in zip(
        got.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(layer.keys, other.keys, rtol=2e-2, atol=2e-2)


def test_repeated_blocks_are_compiled_once(compiled):
    for programs in compiled._compiled_call_impl.by_kind.values():
        for program in programs:
            assert program.regions == LAYERS + 2
            assert program.kernels == 3


def test_siblings_are_one_weight(compiled):
    attention = compiled.model.layers[1].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert all(isinstance(weight, FP4Tensor) for weight in weights)
    assert len({weight.packed_weight.untyped_storage().data_ptr() for weight in weights}) == 1


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (object(), "an argument of type object"),
        (torch.ones(1, requires_grad=True), "requires a gradient"),
    ],
    ids=["type", "gradient"],
)
def test_what_programs_cannot_take_goes_elsewhere(compiled, caplog, argument, reason):
    dispatcher = Dispatcher(compiled, run_eagerly, lambda *args, **kwargs: "elsewhere")
    with caplog.at_level(logging.WARNING, logger="fp4compile"):
        assert dispatcher(tokens(2, 9), unknown=argument) == "elsewhere"
    assert reason in caplog.text
    assert not dispatcher.programs


def test_left_padding(eager, compiled):
    prompt = tokens(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, **GREEDY}
    assert torch.equal(compiled.generate(prompt, **options), eager.generate(prompt, **options))


def test_generate_takes_the_cache_that_it_is_given(eager, compiled):
    from transformers import DynamicCache

    prompt = tokens(1, 6)
    cache = DynamicCache(config=compiled.config)
    got = compiled.generate(prompt, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert cache.get_seq_length() == 9
    assert torch.equal(got, eager.generate(prompt, max_new_tokens=4, **GREEDY))


@pytest.mark.parametrize("role", ["draft", "target"])
def test_assisted_generation_is_left_its_cache(eager, compiled, role):
    other, prompt = tiny_llama(layers=1), tokens(1, 6)
    target, draft = (other, compiled) if role == "draft" else (compiled, other)
    expected = (other if role == "draft" else eager).generate(prompt, max_new_tokens=4, **GREEDY)
    got = target.generate(prompt, assistant_model=draft, max_new_tokens=4, **GREEDY)
    assert torch.equal(got, expected)


def test_other_layouts_are_other_kinds_of_calls():
    x = torch.randn(3, 4, 5)
    layouts = [x, x.transpose(0, 1), x.transpose(1, 2), x[:, :, ::2]]
    assert len({Flattened(value).key for value in layouts}) == len(layouts)
    # Where a dimension of one lies tells nothing, nor do sizes.
    assert Flattened(x[:1].transpose(0, 1)).key == Flattened(torch.randn(4, 1, 5)).key
    assert Flattened(x.transpose(0, 1)).key == Flattened(torch.randn(6, 7, 8).transpose(0, 1)).key


def test_a_generation_config_is_not_changed(eager, compiled):
    config = copy.deepcopy(compiled.generation_config)
    config.max_new_tokens, config.do_sample = 4, False
    before, prompt = config.to_dict(), tokens(1, 5)
    got = compiled.generate(prompt, generation_config=config)
    assert torch.equal(got, eager.generate(prompt, generation_config=config))
    assert config.to_dict() == before


def test_new_weights_are_noticed(eager):
    model, expected = with_programs(eager), copy.deepcopy(eager)
    ids = tokens(1, 5)
    with torch.no_grad():
        model(ids)
        for changed in (model, expected):
            changed.model.norm.weight = nn.Parameter(changed.model.norm.weight / 2)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_merged_weights_are_saved_copied_and_loaded_as_others(eager, compiled, tmp_path):
    ids = tokens(2, 9)
    expected = eager(ids).logits
    compiled.save_pretrained(tmp_path)
    assert torch.equal(type(compiled).from_pretrained(tmp_path)(ids).logits, expected)
    assert torch.equal(copy.deepcopy(compiled)(ids).logits, expected)
    torch.save(compiled, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole(ids).logits, expected)
    before = compiled(ids).logits
    compiled.load_state_dict(eager.state_dict())
    assert torch.equal(compiled(ids).logits, before)
    fresh = copy.deepcopy(eager)
    fresh.load_state_dict(compiled.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
