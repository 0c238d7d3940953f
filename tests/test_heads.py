"""Heads: which sites they are, and that what is common to all logits does not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn

from fp4compile.heads import is_head
from fp4compile.observers import observe
from fp4compile.qparams import QuantSpec
from fp4compile.search import GroupProblem
from fp4compile.search.candidates import apply_activation, minmax_decision, output_errors
from fp4compile.search.fpq import ActivationError
from fp4compile.search.outputs import SquaredOutputs, output_power
from fp4compile.search.tokens import mean_powers, weighted_tokens
from fp4compile.trace import trace
from fp4compile.weights import dequantized


def heads_of(model: nn.Module, x: torch.Tensor, **options: bool) -> set[str]:
    graph = trace(model, (x,), options)
    return {
        site.name for site in graph.sites if is_head(site, *model.get_parameter(site.name).shape)
    }


def test_a_tied_and_an_untied_vocabulary_are_heads_and_no_other_layer():
    tied = tiny_llama(vocabulary=256)
    assert heads_of(tied, tokens(2, 8), use_cache=False) == {"model.embed_tokens.weight"}
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert heads_of(tied, tokens(2, 8), use_cache=False) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (nn.Tanh(), {"0.weight"}),
        (nn.LayerNorm(32), set()),
        (nn.Linear(32, 8), set()),
    ],
    ids=["capped", "normed", "hidden"],
)
def test_a_head_is_what_the_model_returns(last, expected):
    model = nn.Sequential(nn.Linear(8, 32), last)
    assert heads_of(model, torch.randn(2, 8)) == expected


@pytest.mark.parametrize("outputs", [5, 40], ids=["few", "many"])
def test_powers_of_centred_outputs_in_parts_are_those_of_the_whole(outputs):
    x, weight = torch.randn(9, 16), torch.randn(outputs, 16) + 1
    y = x @ weight.t()
    centred = (y - y.mean(dim=1, keepdim=True)).square()
    torch.testing.assert_close(output_power(x, weight, centred=True), centred.sum(dim=1))
    total = SquaredOutputs(centred=True)
    for part in y.split(3, dim=1):
        total.add(part)
    assert total.total == pytest.approx(float(centred.sum()), rel=1e-5)


@pytest.fixture(scope="module", params=[12, 48], ids=["few-outputs", "many-outputs"])
def head(request) -> GroupProblem:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 24), torch.randn(request.param, 24) + 2
    spec = QuantSpec.preset("w4a4")
    return GroupProblem({"w": weight}, observe([x]), spec, heads=frozenset("w"))


def relative_error(problem: GroupProblem) -> float:
    """Of the outputs themselves, computed plainly."""
    tokens, (weights, activation) = weighted_tokens(problem), minmax_decision(problem)
    weight = problem.weights["w"]
    y = tokens.x @ weight.t()
    error = apply_activation(tokens.x, activation) @ dequantized(weight, weights["w"]).t() - y
    if problem.heads:
        y, error = (value - value.mean(dim=1, keepdim=True) for value in (y, error))
    counts = tokens.weight[:, None]
    return float((error.square() * counts).sum() / (y.square() * counts).sum())


def without_unseen(problem: GroupProblem) -> GroupProblem:
    return replace(problem, options=replace(problem.options, unseen=0.0))


@pytest.mark.parametrize("heads", [frozenset("w"), frozenset()], ids=["head", "layer"])
def test_errors_of_heads_are_of_centred_outputs(head, heads):
    problem = without_unseen(replace(head, heads=heads))
    tokens, (weights, activation) = weighted_tokens(problem), minmax_decision(problem)
    expected = relative_error(problem)
    errors = output_errors(problem, tokens, weights, activation)
    assert errors["w"] == pytest.approx(expected, rel=1e-4)
    objective = ActivationError.of(problem, weights, mean_powers(problem, tokens))
    assert objective.exact_on(tokens)(activation) == pytest.approx(expected, rel=1e-3)
