"""``fp4compile generate`` and ``fp4compile chat``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from fp4compile.commands.loading import Loaded, load
from fp4compile.commands.options import (
    CacheBits,
    Compile,
    Dtype,
    JsonPath,
    Model,
    cache_maker,
    dtype_of,
)
from fp4compile.commands.output import STDOUT, console, emit
from fp4compile.compile import compile_model
from fp4compile.errors import ModelError

EXAMPLES = """
[bold]Examples[/]

  fp4compile generate out/smollm2 "Once upon a time" --new-tokens 60

  fp4compile generate out/smollm2 "Once upon a time" --temperature 0.8 --seed 1 --compile
"""
CHAT_EXAMPLES = """
[bold]Examples[/]

  fp4compile chat out/smollm2

  echo "What is the capital of France?" | fp4compile chat out/smollm2
"""
END = ("exit", "quit")

NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 always takes the most likely token; else sample.")
]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache_bits: CacheBits = None,
    compile_it: Compile = False,
    dtype: Dtype = "float32",
    json_path: JsonPath = None,
) -> None:
    """Let MODEL continue a text; with no --json it is printed as it comes."""
    loaded = _load(model, dtype, compile_it=compile_it)
    encoded = loaded.needed_tokenizer()(prompt, return_tensors="pt")
    quiet = json_path == STDOUT
    start = time.perf_counter()
    sampling = _sampling(new_tokens, temperature, cache_maker(cache_bits, loaded.model))
    text, count = _generate(loaded, encoded, sampling, seed, stream=not quiet)
    seconds = time.perf_counter() - start
    result = {"prompt": prompt, "text": text, "new_tokens": count, "seconds": seconds}
    how = "" if compile_it else ", without --compile"
    said = f"\n{count} tokens, {count / seconds:.1f} per second{how}"
    emit(result, Text(said, "dim"), json_path)


def chat(
    model: Model,
    new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache_bits: CacheBits = None,
    compile_it: Compile = False,
    dtype: Dtype = "float32",
) -> None:
    """Talk with MODEL; an empty line, 'exit' or Ctrl-D ends."""
    loaded = _load(model, dtype, compile_it=compile_it)
    tokenizer = loaded.needed_tokenizer()
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{model} has no chat template, so it was not trained to talk; "
            "use fp4compile generate, or give an instruction-tuned model"
        )
    new_cache = cache_maker(cache_bits, loaded.model)
    said: list[dict[str, str]] = []
    for question in _questions():
        said.append({"role": "user", "content": question})
        encoded = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        # A cache anew: the whole talk is the prompt.
        sampling = _sampling(new_tokens, temperature, new_cache)
        answer, _ = _generate(loaded, encoded, sampling, seed, stream=True)
        said.append({"role": "assistant", "content": answer})


def _load(name: str, dtype: str, *, compile_it: bool) -> Loaded:
    loaded = load(name, dtype_of(dtype))
    if not hasattr(loaded.model, "generate") or not loaded.model.can_generate():
        raise ModelError(
            f"{name} is a {type(loaded.model).__name__}, which does not generate text; "
            "give a causal language model"
        )
    if compile_it:
        compile_model(loaded.model)
    return loaded


def _questions() -> Iterator[str]:
    """Lines of the user until an empty one; the prompt sign is for terminals."""
    while True:
        if sys.stdin.isatty():
            console().print("[bold]> [/]", end="")
        line = sys.stdin.readline().strip()
        if not line or line in END:
            return
        yield line


def _sampling(
    new_tokens: int, temperature: float, new_cache: Callable[[], Any] | None
) -> dict[str, Any]:
    """Arguments of ``generate``."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if new_cache is not None:
        options["past_key_values"] = new_cache()
    return options


@torch.no_grad()
def _generate(
    loaded: Loaded, encoded: Any, options: dict[str, Any], seed: int, *, stream: bool
) -> tuple[str, int]:
    """(text without the prompt, number of its tokens), printed as it comes with ``stream``."""
    from transformers import TextStreamer

    tokenizer = loaded.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    output = loaded.model.generate(**encoded, streamer=streamer if stream else None, **options)
    new = output[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)
