"""A call like the one before is recognised, one that is not is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.models.llama import LlamaConfig

from fp4compile.program.repeat import Pattern
from fp4compile.program.values import Flattened


def cache() -> StaticCache:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=1, hidden_size=2)
    made = StaticCache(config=config, max_cache_len=3)
    made.early_initialization(1, 1, 2, torch.float32, torch.device("cpu"))
    return made


def call(used: StaticCache, **changed: Any) -> tuple[Any, ...]:
    masks = {"full": torch.randn(1, 1, 1, 3), "none": None}
    named = {"ids": torch.randint(9, (1, 1)), "masks": masks, "sizes": [1, 2.0], "cache": used}
    return False, (), {**named, **changed}


def test_the_next_call_is_flattened_as_if_it_were_the_first():
    used = cache()
    pattern = Pattern(call(used), Flattened(call(used)))
    later = call(used)
    got, expected = pattern.flatten(later), Flattened(later)
    assert got is not None
    assert got.key == expected.key
    assert got.uncached == expected.uncached
    assert all(a is b for a, b in zip(got.tensors, expected.tensors, strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"ids": torch.zeros(1, 2, dtype=torch.long)},
        {"ids": torch.zeros(1, 1, dtype=torch.int)},
        {"ids": torch.zeros(1, 1, requires_grad=True)},
        {"ids": [torch.zeros(1, 1, dtype=torch.long)]},
        {"masks": {"full": torch.randn(1, 1, 1, 3)}},
        {"masks": {"full": torch.randn(1, 1, 3, 1).mT[..., ::1].expand(1, 1, 1, 3), "none": 0}},
        {"sizes": [1, 2]},
        {"sizes": (1, 2.0)},
        {"sizes": [1, 2.0, 3]},
        {"cache": cache()},
        {"more": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_calls_do_not_match(changed):
    used = cache()
    pattern = Pattern(call(used), Flattened(call(used)))
    assert pattern.flatten(call(used, **changed)) is None


def test_strides_count():
    def of(x: Tensor) -> tuple[Any, ...]:
        return False, (x,), {}

    x = torch.randn(3, 3)
    pattern = Pattern(of(x), Flattened(of(x)))
    assert pattern.flatten(of(x + 1)) is not None
    assert pattern.flatten(of(x.T)) is None


def test_a_cache_that_was_changed_does_not_match():
    used = cache()
    pattern = Pattern(call(used), Flattened(call(used)))
    used.layers[1].keys = used.layers[1].keys.clone()
    assert pattern.flatten(call(used)) is None
