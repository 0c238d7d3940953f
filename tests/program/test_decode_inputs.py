"""Inputs of decode steps are those that the model itself would make, without being made."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import VOCABULARY, tiny_llama, tokens
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fp4compile.program.decode_inputs import DecodeInputs, Steps
from fp4compile.program.generate import leave_generate, use_static_cache

PREPARE = "prepare_inputs_for_generation"


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCABULARY)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["llama", "gpt2", "eager attention"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = tiny_gpt2() if request.param == "gpt2" else tiny_llama()
    if request.param == "eager attention":
        made.set_attn_implementation("eager")  # masks of floats
    use_static_cache(made)
    return made


def equal(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(got, expected) and got.dtype == expected.dtype
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(
            equal(got[name], expected[name]) for name in expected
        )
    return got is expected or got == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("padded", [False, True])
def test_they_are_what_the_model_makes(model, monkeypatch, padded, options):
    """Steps, and how many of them the model made itself."""
    inputs, counts = vars(model)[PREPARE], {"steps": 0, "made": 0}
    own, taught = inputs._prepare, Steps.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["made"] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(inputs, "_prepare", counted)

    def compared(self: Steps, input_ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        counts["steps"] += 1
        got = taught(self, input_ids, arguments)
        assert equal(got, own(input_ids, **arguments))
        return got

    monkeypatch.setattr(Steps, "__call__", compared)
    prompt = tokens(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, : 3 * padded] = 0
    model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    assert counts == {"steps": 7, "made": 3}  # the prompt and two steps


def steps(inputs: list[dict[str, Any]], arguments: dict[str, Any] | None = None) -> list[bool]:
    """Whether each step was made, where the steps would be ``inputs``."""
    made: list[bool] = []

    def prepare(input_ids: Tensor, **_: Any) -> dict[str, Any]:
        made[-1] = True
        return {"input_ids": input_ids[:, -1:], **inputs[len(made) - 1]}

    told = Steps(prepare)
    for number in range(len(inputs)):
        made.append(False)
        got = told(tokens(1, 3 + number), arguments or {})
        assert equal(got, {"input_ids": tokens(1, 3 + number)[:, -1:], **inputs[number]})
    return made


def visible(shown: int) -> Tensor:
    return (torch.arange(9) < shown).view(1, 1, 1, 9)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([{"position_ids": torch.tensor([[each]])} for each in range(5)], True),
        ([{"mask": {"full": visible(each)}, "use": True} for each in range(5)], True),
        ([{"position_ids": torch.tensor([[2 * each]])} for each in range(5)], False),
        ([{"mask": visible(2 * each)} for each in range(4)], False),
        ([{"mask": ~visible(each) * visible(each + 1)} for each in range(5)], False),
        ([{"scale": each} for each in range(5)], False),
        ([{"embeds": torch.full((1, 1, 2), 0.5 * each)} for each in range(5)], False),
        ([{"mask": torch.ones(1, each)} for each in range(5)], False),
    ],
    ids=["positions", "masks", "strides", "columns", "window", "number", "floats", "growing"],
)
def test_only_regular_steps_are_told(inputs, told):
    assert steps(inputs) == [True, True, *[not told] * (len(inputs) - 2)]


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, arguments: (ids[:, :-1], arguments),
        lambda ids, arguments: (ids.repeat(2, 1), arguments),
        lambda ids, arguments: (ids, {**arguments, "more": 1}),
        lambda ids, arguments: (ids, {"cache": object()}),
    ],
    ids=["length", "batch", "names", "cache"],
)
def test_a_step_that_does_not_follow_is_made(change):
    made = 0

    def prepare(input_ids: Tensor, **_: Any) -> dict[str, Any]:
        nonlocal made
        made += 1
        return {
            "input_ids": input_ids[:, -1:],
            "position_ids": torch.tensor([[input_ids.shape[1]]]),
        }

    told, arguments = Steps(prepare), {"cache": object()}
    for length in (3, 4, 5):
        told(tokens(1, length), arguments)
    assert made == 2
    ids, changed = change(tokens(1, 6), arguments)
    assert told(ids, changed)["position_ids"].item() == ids.shape[1]
    assert made == 3


def test_outside_of_a_loop_the_model_makes_them(model):
    ids = tokens(1, 4)
    for _ in range(4):
        got = model.prepare_inputs_for_generation(ids, next_sequence_length=1)
        expected = type(model).prepare_inputs_for_generation(model, ids, next_sequence_length=1)
        assert equal(got, expected)


def test_embeddings_may_take_the_place_of_the_prompt(model):
    ids = tokens(1, 4)
    embeds = model.get_input_embeddings()(ids).detach()
    got = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=6, do_sample=False)[:, 4:])


def test_a_copy_prepares_its_own(model):
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(copied)[PREPARE]._model is copied


def test_a_model_with_its_own_way_keeps_it():
    model = tiny_llama()
    model.create_masks_for_generate = lambda **_: None
    use_static_cache(model)
    assert PREPARE not in vars(model)


def test_it_is_taken_away_again(model):
    assert isinstance(vars(model)[PREPARE], DecodeInputs)
    leave_generate(model)
    assert PREPARE not in vars(model)
