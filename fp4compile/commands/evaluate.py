"""``fp4compile eval``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from fp4compile.commands.loading import load
from fp4compile.commands.options import (
    CacheBits,
    Compile,
    Dtype,
    JsonPath,
    Model,
    TaskDir,
    TaskLimit,
    cache_maker,
    dtype_of,
)
from fp4compile.commands.output import STDOUT, emit, table
from fp4compile.compile import compile_model
from fp4compile.errors import EvaluationError
from fp4compile.evaluate import divergence, model_size, perplexity
from fp4compile.tasks import run_tasks
from fp4compile.texts import read_texts, text_ids

EXAMPLES = """
[bold]Examples[/]

  fp4compile eval out/smollm2

  fp4compile eval out/smollm2 --data my_text.txt --tokens 4088 --json result.json

  fp4compile eval out/smollm2 --cache-bits 4

  fp4compile eval out/smollm2 --reference demo

  fp4compile eval MODEL --data Salesforce/wikitext:wikitext-2-raw-v1:test

  fp4compile eval out/smollm2 --task hellaswag --task arc_easy --limit 100
"""


def command(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Text to score: 'heldout' (bundled WikiText-2 test), a file, or "
            "name[:config[:split]] of a data set on the hub."
        ),
    ] = "heldout",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, in whole windows.")] = 8176,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Another model, as MODEL was before it was quantized: how far the probabilities "
            "of the next token are from its own (KL divergence)."
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval instead of a text; repeatable.")
    ] = None,
    task_dir: TaskDir = None,
    limit: TaskLimit = None,
    cache_bits: CacheBits = None,
    compile_it: Compile = False,
    dtype: Dtype = "float32",
    json_path: JsonPath = None,
) -> None:
    """Perplexity of MODEL on a text, or its score in tasks of lm-eval."""
    if task and reference:
        raise EvaluationError(
            "--reference compares models on a text, --task scores questions instead; "
            "leave one of them out"
        )
    texts = [] if task else read_texts(data)
    loaded = load(model, dtype_of(dtype))
    if compile_it:
        compile_model(loaded.model)
    new_cache = cache_maker(cache_bits, loaded.model)
    if task:
        scores = run_tasks(
            loaded.model, loaded.needed_tokenizer(), task, limit=limit, task_dir=task_dir
        )
    else:
        quiet = json_path == STDOUT
        ids = text_ids(loaded.needed_tokenizer(), "\n".join(texts))
        chosen: dict[str, Any] = {
            "window": window,
            "max_tokens": tokens,
            "progress": not quiet,
            "new_cache": new_cache,
        }
        if reference:
            other = load(reference, dtype_of(dtype)).model
            scores = asdict(divergence(loaded.model, other, ids, **chosen))
        else:
            scores = asdict(perplexity(loaded.model, ids, **chosen))
    size = model_size(loaded.model)
    result = {
        "model": model,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "bits_per_weight": size.bits_per_weight,
        "cache_bits": cache_bits,
        **({"reference": reference} if reference else {}),
        **({"tasks": scores} if task else {"data": data, "window": window, **scores}),
    }
    emit(result, _table(result), json_path)


def _table(result: dict[str, Any]) -> Any:
    made = table("", ">")
    made.add_row("model", result["model"])
    made.add_row("bits per weight", f"{result['bits_per_weight']:.2f}")
    if result["cache_bits"] is not None:
        made.add_row("bits of keys and values", str(result["cache_bits"]))
    for name, metrics in result.get("tasks", {}).items():
        for metric, value in metrics.items():
            made.add_row(f"{name}, {metric}", f"{value:.4f}")
    if "perplexity" in result:
        made.add_row("perplexity", f"{result['perplexity']:.2f}")
        if "divergence" in result:
            made.add_row(
                f"KL divergence from {result['reference']}",
                f"{result['divergence']:.4f} ± {result['standard_error']:.4f} nats",
            )
            made.add_row("same token likeliest", f"{result['agreement']:.1%}")
        made.add_row("tokens scored", f"{result['tokens']} of {result['data']}")
        made.add_row("window", str(result["window"]))
    return made
