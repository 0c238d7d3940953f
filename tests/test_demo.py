"""The demo from end to end, on a tiny random Llama in place of the real model."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from models import byte_tokenizer
from rich.console import Console

from fp4compile import demo
from fp4compile.batches import bundled
from fp4compile.evaluate import perplexity
from fp4compile.texts import text_ids

transformers = pytest.importorskip("transformers")


def _tiny_model(cache_dir: object, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval(), byte_tokenizer()


def test_the_demo_measures_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_demo_model", _tiny_model)
    console = Console(file=io.StringIO(), width=200)
    # What compiling does to a model is tested elsewhere, and would take most of the time here.
    with torch.compiler.set_stance("force_eager"):
        numbers = demo.run_demo("w4a4", "minmax", tokens=1022, new_tokens=4, console=console)
    assert json.loads(json.dumps(numbers)) == numbers

    full, quantized = numbers["full_precision"], numbers["w4a4"]
    model, tokenizer = _tiny_model(None, torch.bfloat16)
    ids = text_ids(tokenizer, bundled("heldout.txt"))
    expected = perplexity(model.float(), ids, max_tokens=1022)
    assert full["perplexity"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert full["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert quantized["bits_per_weight"] < 8
    for measured in (full, quantized):
        assert measured["perplexity"]["tokens"] == 1022
        assert math.isfinite(measured["perplexity"]["perplexity"])
        assert measured["speed"]["prefill"]["median"] > 0
        assert measured["speed"]["decode"]["median"] > 0

    table = console.file.getvalue()
    assert all(label in table for label, _ in demo.ROWS)
