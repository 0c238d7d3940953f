"""``fp4compile demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fp4compile.commands.options import Method, Preset
from fp4compile.demo import run_demo


def command(
    preset: Preset = "w4a4",
    method: Method = "fpq",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the model is kept; default $FP4COMPILE_CACHE or ~/.cache/fp4compile."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=511, help="Tokens to score; a window of 512 scores 511.")
    ] = 8176,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 40,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file.")
    ] = None,
) -> None:
    """Quantize SmolLM2-135M-Instruct, compile it, and compare it with full precision."""
    numbers = run_demo(preset, method, cache_dir=cache_dir, tokens=tokens, new_tokens=new_tokens)
    if json_path is not None:
        json_path.write_text(json.dumps(numbers, indent=2) + "\n")
