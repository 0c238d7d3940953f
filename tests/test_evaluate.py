"""Perplexity, generation speed and size, each against a model whose numbers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fp4compile import evaluate
from fp4compile.errors import EvaluationError
from fp4compile.evaluate import (
    ModelSize,
    divergence,
    measure_generation_speed,
    model_size,
    perplexity,
)

VOCABULARY = 11


class Bigram(nn.Module):
    """Next-token logits that depend on the current token only."""

    def __init__(self, table: Tensor, wrap: Callable[[Tensor], Any] = lambda logits: logits):
        super().__init__()
        self.table = nn.Parameter(table)
        self.wrap = wrap

    def forward(self, input_ids: Tensor) -> Any:
        return self.wrap(F.embedding(input_ids, self.table))


def _random_ids(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(0))


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    result = perplexity(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), _random_ids(64), window=8)
    assert result.perplexity == pytest.approx(VOCABULARY)
    assert result.tokens == 8 * 7
    assert result.nll == pytest.approx(8 * 7 * math.log(VOCABULARY))


def test_each_window_scores_all_but_its_first_token() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    ids = _random_ids(35)  # the last 5 tokens fill no window of 10
    logprobs = table.log_softmax(-1)
    expected = -sum(logprobs[ids[at - 1], ids[at]].item() for at in range(30) if at % 10 != 0)
    result = perplexity(Bigram(table), ids, window=10)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 27
    assert result.perplexity == pytest.approx(math.exp(expected / 27), rel=1e-5)


def test_model_outputs_with_logits_and_a_batch_dimension_are_understood() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    wrapped = Bigram(table, lambda logits: SimpleNamespace(logits=logits.bfloat16()))
    plain = perplexity(Bigram(table), _random_ids(20), window=10)
    assert perplexity(wrapped, _random_ids(20)[None], window=10).perplexity == pytest.approx(
        plain.perplexity, rel=1e-2
    )


@pytest.mark.parametrize(("max_tokens", "tokens"), [(None, 36), (9, 9), (18, 18), (26, 18)])
def test_max_tokens_counts_scored_tokens_in_whole_windows(
    max_tokens: int | None, tokens: int
) -> None:
    model = Bigram(torch.zeros(VOCABULARY, VOCABULARY))
    assert perplexity(model, _random_ids(40), window=10, max_tokens=max_tokens).tokens == tokens


@pytest.mark.parametrize(
    ("count", "options"),
    [(9, {"window": 10}), (40, {"window": 10, "max_tokens": 8}), (40, {"window": 1})],
    ids=["short text", "few tokens", "empty window"],
)
def test_nothing_to_score_is_an_error(count: int, options: dict[str, int]) -> None:
    with pytest.raises(EvaluationError, match="window"):
        perplexity(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), _random_ids(count), **options)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    table = torch.full((VOCABULARY, VOCABULARY), -1e4)
    table[:, 0] = 1e4
    ids = torch.ones(8, dtype=torch.long)
    assert perplexity(Bigram(table), ids, window=8).perplexity == math.inf


def _table(seed: int) -> Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_that_of_each_tokens_distribution() -> None:
    tables, ids = (_table(1), _table(2)), _random_ids(35)
    p, q = (table.softmax(-1)[ids[[at for at in range(30) if at % 10 != 9]]] for table in tables)
    each = (p * (p / q).log()).sum(-1)
    found = divergence(Bigram(tables[1]), Bigram(tables[0]), ids, window=10)
    assert found.tokens == 27
    assert found.divergence == pytest.approx(each.mean().item(), rel=1e-4)
    assert found.standard_error == pytest.approx(each.std().item() / 27**0.5, rel=0.03)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_a_model_does_not_diverge_from_itself() -> None:
    found = divergence(Bigram(_table(1)), Bigram(_table(1)), _random_ids(20), window=10)
    assert (found.divergence, found.agreement) == (pytest.approx(0, abs=1e-7), 1)


def test_models_of_different_vocabularies_cannot_be_compared() -> None:
    other = torch.zeros(VOCABULARY, VOCABULARY + 1)
    with pytest.raises(EvaluationError, match="vocabulary"):
        divergence(Bigram(_table(1)), Bigram(other), _random_ids(20), window=10)


class Clock:
    """Generates at known speeds, on its own time; the first round, which compiles, is slow."""

    seconds = 0.0
    calls = 0

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **options: Any) -> None:
        assert options["min_new_tokens"] == max_new_tokens
        assert not options["do_sample"]
        self.calls += 1
        compiling = 100.0 if self.calls <= 2 else 0.0
        self.seconds += compiling + input_ids.shape[1] / 64 + (max_new_tokens - 1) / 4


def test_speed_separates_prefill_from_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock.seconds)
    prompt = torch.ones(1, 16, dtype=torch.long)
    speed = measure_generation_speed(clock, prompt, 9, repeats=2)
    assert clock.calls == 2 * (1 + 2)
    for spread, expected in ((speed.prefill, 64.0), (speed.decode, 4.0)):
        assert (spread.low, spread.median, spread.high) == pytest.approx((expected,) * 3)
    assert (speed.prompt_tokens, speed.new_tokens) == (16, 9)


def test_one_new_token_times_no_decode() -> None:
    with pytest.raises(EvaluationError, match="new_tokens=1"):
        measure_generation_speed(Clock(), torch.ones(1, 4, dtype=torch.long), 1)


class Holder(nn.Module):
    def __init__(self, *parameters: Tensor):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parameters)


def test_size_counts_bytes_of_parameters_and_buffers() -> None:
    model = Holder(torch.zeros(4, 8, dtype=torch.bfloat16))
    model.register_buffer("positions", torch.zeros(6, dtype=torch.int32))
    assert model_size(model) == ModelSize(bytes=64 + 24, weights=32)
    assert model_size(model).bits_per_weight == 8 * 88 / 32


def test_size_counts_tied_weights_once() -> None:
    weight = torch.zeros(4, 8)
    assert model_size(Holder(weight, weight.detach())) == ModelSize(bytes=128, weights=32)


def test_size_counts_both_halves_of_one_storage() -> None:
    assert model_size(Holder(*torch.zeros(8, 8).chunk(2))) == ModelSize(bytes=256, weights=64)


def test_size_of_a_tensor_subclass_is_that_of_what_it_holds() -> None:
    inner = torch.zeros(4, 8)
    nested = TwoTensor(TwoTensor(inner, inner.clone()), TwoTensor(inner.clone(), inner))
    assert model_size(Holder(nested)) == ModelSize(bytes=3 * 128, weights=32)


@pytest.mark.parametrize(
    ("tensor", "size"),
    [(torch.empty(4, 8, device="meta"), ModelSize(128, 32)), (torch.empty(0), ModelSize(0, 0))],
    ids=["meta", "empty"],
)
def test_size_without_memory(tensor: Tensor, size: ModelSize) -> None:
    assert model_size(Holder(tensor)) == size


def test_size_of_nothing() -> None:
    assert model_size(nn.Identity()).bits_per_weight == 0.0
