"""A step is repeated where only small inputs have changed, else it is run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.models.llama import LlamaConfig

from fp4compile.program import replay
from fp4compile.program.replay import Replays
from fp4compile.program.values import CacheMemo, Flattened

WEIGHT = torch.tensor([2.0, 3.0])


class Kernels:
    """Records one kernel: ``out[...] = weight * x`` by addresses, as native ones do."""

    def __init__(self, evaluate: Evaluated) -> None:
        self._evaluate, self.obstacle = evaluate, None
        self.tensors: list[Tensor] = []

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: Any) -> None:
        self.tensors = [*self._evaluate.last]

    def replay(self) -> Any:
        x, out = self.tensors
        return lambda: torch.mul(WEIGHT, x, out=out)


class Evaluated:
    """Counts how often it is run; ``result`` makes what is returned of (tensors, product)."""

    def __init__(self, result: Any) -> None:
        self._result, self.runs = result, 0
        self.last: tuple[Tensor, Tensor] = (WEIGHT, WEIGHT)

    def __call__(self, tensors: Any) -> list[Any]:
        self.runs += 1
        self.last = (tensors[0], WEIGHT * tensors[0])
        return self._result(tensors, self.last[1])


def cache() -> StaticCache:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=2)
    made = StaticCache(config=config, max_cache_len=3)
    made.early_initialization(1, 1, 2, torch.float32, torch.device("cpu"))
    return made


def steps(result: Any, caches: list[StaticCache]) -> tuple[Evaluated, list[tuple[Tensor, Any]]]:
    """One call with each of the caches; what was run, and every call's (input, results)."""
    evaluate, memo, calls = Evaluated(result), CacheMemo(), []
    replays = Replays(evaluate, lambda: Kernels(evaluate), [WEIGHT])
    for number, each in enumerate(caches):
        x = torch.tensor([1.0, 1.0 + number])
        calls.append((x.clone(), replays(Flattened((x, each), memo))))
    return evaluate, calls


def test_later_steps_on_a_cache_are_repeated():
    evaluate, calls = steps(lambda _, product: [product, 7], [cache()] * 5)
    assert evaluate.runs == 2  # one to see the place, one to record
    for x, (product, number) in calls:
        assert torch.equal(product, WEIGHT * x)  # also of steps long past
        assert number == 7


def test_another_cache_is_another_place():
    first, second = cache(), cache()
    evaluate, calls = steps(lambda _, product: [product], [first] * 3 + [second] * 3)
    assert evaluate.runs == 4
    assert all(torch.equal(product, WEIGHT * x) for x, (product,) in calls)


def test_inputs_that_are_returned_are_the_callers():
    used = cache()
    evaluate, calls = steps(lambda tensors, _: list(tensors[:2]), [used] * 4)
    assert evaluate.runs == 2
    for x, (same, _) in calls:
        assert torch.equal(same, x)


def write_input(tensors: Any, product: Tensor) -> list[Any]:
    tensors[0].zero_()
    return [product]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (write_input, "an input is written"),
        (lambda tensors, _: [tensors[1][:1]], "a result is a part of a cache"),
    ],
    ids=["written", "alias"],
)
def test_what_cannot_be_repeated_is_run(result, reason, caplog):
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        evaluate, _ = steps(result, [cache()] * 5)
    assert evaluate.runs == 5
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("MAX_COPIED", "too large to be copied"), ("MAX_KEPT", "too large to be kept")],
)
def test_large_steps_are_run(limit, reason, caplog, monkeypatch):
    monkeypatch.setattr(replay, limit, 1)
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        evaluate, _ = steps(lambda _, product: [product], [cache()] * 4)
    assert evaluate.runs == 4
    assert reason in caplog.text


def test_a_cache_is_not_kept_alive():
    import gc
    import weakref

    used = cache()
    evaluate, memo = Evaluated(lambda _, product: [product]), CacheMemo()
    replays = Replays(evaluate, lambda: Kernels(evaluate), [WEIGHT])
    for _ in range(3):
        replays(Flattened((torch.ones(2), used), memo))
    keys = weakref.ref(used.layers[0].keys)
    del used
    gc.collect()
    assert keys() is None
