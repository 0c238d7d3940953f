"""The command line. A mistake of the user's is one line and exit code 1, never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fp4compile.commands import codegen
from fp4compile.demo import run_demo
from fp4compile.errors import Fp4CompileError
from fp4compile.qparams import PRESETS
from fp4compile.search import METHODS

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
app.command("codegen", epilog=codegen.EXAMPLES)(codegen.command)


@app.callback()
def _commands() -> None:
    """Quantizes PyTorch models to 4-bit floating point and compiles them."""


@app.command()
def demo(
    preset: Annotated[
        str, typer.Option(help=f"Weight and activation bits: {', '.join(PRESETS)}.")
    ] = "w4a4",
    method: Annotated[str, typer.Option(help=f"Search: {', '.join(METHODS)}.")] = "fpq",
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


def main() -> None:
    """Entry point of ``fp4compile`` and ``python -m fp4compile``."""
    try:
        app()
    except Fp4CompileError as error:
        print(f"fp4compile: error: {error}", file=sys.stderr)
        sys.exit(1)
