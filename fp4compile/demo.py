"""The demo: one real model in full precision and in FP4, measured the same way."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fp4compile
from fp4compile.batches import bundled
from fp4compile.demo_model import MODEL_NAME, load_demo_model
from fp4compile.evaluate import (
    GenerationSpeed,
    ModelSize,
    PerplexityResult,
    Spread,
    measure_generation_speed,
    model_size,
    perplexity,
)
from fp4compile.qparams import QuantSpec
from fp4compile.search import by_method
from fp4compile.texts import text_ids

QUESTION = "What is the capital of France, and what is it known for?"
PROMPT_TOKENS = 128
# Perplexities compare at one dtype only, and every CPU has this one; the weights are stored, and
# their size is counted, in bfloat16.
COMPUTE_DTYPE = torch.float32


@dataclass(frozen=True)
class Measurement:
    """One model's column of the table."""

    perplexity: PerplexityResult
    size: ModelSize
    speed: GenerationSpeed
    answer: str


ROWS: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("perplexity", lambda m: f"{m.perplexity.perplexity:.2f}"),
    ("bits per weight", lambda m: f"{m.size.bits_per_weight:.2f}"),
    ("checkpoint size", lambda m: f"{m.size.bytes / 1e6:.1f} MB"),
    ("prefill, tokens/s", lambda m: _spread(m.speed.prefill)),
    ("decode, tokens/s", lambda m: _spread(m.speed.decode)),
    ("answer", lambda m: m.answer),
)


def run_demo(
    preset: str = "w4a4",
    method: str = "fpq",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    tokens: int = 8176,
    new_tokens: int = 40,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures the demo model before and after ``quantize_and_compile``; prints one table.

    Returns:
        The numbers of the table, ready for ``json.dumps``.
    """
    QuantSpec.preset(preset)  # a wrong name fails here, not after minutes of measuring
    by_method(method)
    console = console or Console()
    full = _measure_full(cache_dir, tokens, new_tokens, console)
    _free()
    quantized, seconds = _measure_quantized(preset, method, cache_dir, tokens, new_tokens, console)
    console.print(_table(preset, method, full, quantized, seconds))
    return {
        "model": MODEL_NAME,
        "preset": preset,
        "method": method,
        "threads": torch.get_num_threads(),
        "quantize_seconds": seconds,
        "full_precision": _numbers(full),
        preset: _numbers(quantized),
    }


def _measure_full(
    cache_dir: str | os.PathLike[str] | None, tokens: int, new_tokens: int, console: Console
) -> Measurement:
    console.print(f"[bold]Full precision:[/] {MODEL_NAME}, torch.compile (first calls compile)")
    model, tokenizer = load_demo_model(cache_dir, torch.bfloat16)
    size = model_size(model)
    model.to(COMPUTE_DTYPE).compile(dynamic=True)
    return _measure(model, tokenizer, size, tokens, new_tokens)


def _measure_quantized(
    preset: str,
    method: str,
    cache_dir: str | os.PathLike[str] | None,
    tokens: int,
    new_tokens: int,
    console: Console,
) -> tuple[Measurement, float]:
    console.print(f"[bold]FP4:[/] {preset}, {method}, quantize_and_compile (first calls compile)")
    model, tokenizer = load_demo_model(cache_dir, COMPUTE_DTYPE)
    start = time.perf_counter()
    model = fp4compile.quantize_and_compile(model, spec=preset, method=method, tokenizer=tokenizer)
    seconds = time.perf_counter() - start
    return _measure(model, tokenizer, model_size(model), tokens, new_tokens), seconds


def _measure(
    model: Any, tokenizer: Any, size: ModelSize, tokens: int, new_tokens: int
) -> Measurement:
    ids = text_ids(tokenizer, bundled("heldout.txt"))
    return Measurement(
        perplexity(model, ids, max_tokens=tokens, progress=True),
        size,
        measure_generation_speed(model, ids[:, :PROMPT_TOKENS], new_tokens, progress=True),
        _answer(model, tokenizer, new_tokens),
    )


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, new_tokens: int) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def _table(
    preset: str, method: str, full: Measurement, quantized: Measurement, seconds: float
) -> Table:
    speed = full.speed
    table = Table(
        title=f"{MODEL_NAME}, {preset} ({method}; quantized in {seconds:.0f} s)",
        caption=(
            f"Perplexity on {full.perplexity.tokens} tokens of WikiText-2 test, windows of 512. "
            f"Speed: batch 1, {speed.prompt_tokens} prompt and {speed.new_tokens} new tokens, "
            f"{COMPUTE_DTYPE}, {torch.get_num_threads()} threads, median (lowest to highest). "
            f"Full precision: as stored in bfloat16, under torch.compile. Question: {QUESTION}"
        ),
        show_lines=True,
    )
    table.add_column("")
    table.add_column("full precision")
    table.add_column(preset)
    for label, cell in ROWS:
        table.add_row(label, cell(full), cell(quantized))
    return table


def _spread(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})"


def _numbers(measured: Measurement) -> dict[str, Any]:
    return {**asdict(measured), "bits_per_weight": measured.size.bits_per_weight}


def _free() -> None:
    """Lets go of the first model's weights and graphs before the second one is loaded."""
    torch.compiler.reset()
    gc.collect()
