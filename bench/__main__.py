"""``python -m bench``: one command per benchmark, JSON lines with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench import accuracy as accuracy_bench
from bench import gemm as gemm_bench
from bench import model as model_bench
from bench.peers import MODELS, PEERS

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """Measures fp4compile on this machine."""


@app.command()
def gemm(
    shape: Annotated[list[str], typer.Option(help="N x K of the weight; repeatable.")] = [  # noqa: B006 - typer reads it
        "4096x4096"
    ],
    m: Annotated[list[int], typer.Option(help="Rows of the activation; repeatable.")] = [  # noqa: B006 - typer reads it
        1,
        16,
        128,
        512,
    ],
    threads: Annotated[int, typer.Option(help="Threads for everybody.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Turns per candidate.")] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """One linear layer: FP4 beside bf16 and fp32, activation quantization included."""
    shapes = [(int(n), int(k)) for n, k in (text.lower().split("x") for text in shape)]
    for result in gemm_bench.run(shapes, m, threads, repetitions):
        timing = result.timing
        typer.echo(
            f"{result.N}x{result.K} M={result.M:<4} {result.name:<18}"
            f"{timing.median * 1e3:9.3f} ms ({timing.low * 1e3:.3f} to {timing.high * 1e3:.3f})"
            f"{result.gops:9.1f} GOPS, weights read at {result.bandwidth_share:.0%} of bandwidth"
        )
        if json_path is not None:
            with json_path.open("a") as lines:
                lines.write(json.dumps(result.to_json()) + "\n")


@app.command()
def model(
    name: Annotated[
        str, typer.Option("--model", help=f"One of {', '.join(MODELS)}.")
    ] = "smollm2-135m",
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A candidate; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads for everybody.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded per turn.")] = 32,
    repetitions: Annotated[int, typer.Option(help="Turns per candidate.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """A whole model at batch 1: prefill and decode, compile time cold and warm, peak memory."""
    _check(name, MODELS, "models")
    for candidate in only or ():
        _check(candidate, PEERS, "candidates")
    for result in model_bench.run(only or list(PEERS), name, threads, prompt, new, repetitions):
        if isinstance(result, model_bench.Skipped):
            typer.echo(f"{result.name:<22}skipped: {result.reason}")
            continue
        warm = "" if result.compile_warm is None else f", warm {result.compile_warm:.0f}"
        typer.echo(
            f"{result.name:<22}prefill {_spread(result.prefill)}  decode {_spread(result.decode)} "
            f"tokens/s  token {result.token_ms_p50:.2f} ms, 95% below {result.token_ms_p95:.2f}  "
            f"first call {result.compile_cold:.0f} s{warm}  "
            f"peak {result.peak_bytes / 2**30:.2f} GiB"
        )
        if json_path is not None:
            with json_path.open("a") as lines:
                lines.write(json.dumps(result.to_json()) + "\n")


def _spread(spread: tuple[float, float, float]) -> str:
    return "{:.0f} ({:.0f} to {:.0f})".format(*spread)


def _check(name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of the {what}; there are {list(known)}")


@app.command()
def accuracy(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A configuration; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of WikiText-2 test to score.")] = (
        accuracy_bench.TOKENS
    ),
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """SmolLM2-135M quantized in many ways: perplexity, layer errors, time and peak memory."""
    known = list(accuracy_bench.CONFIGURATIONS)
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown} are no configurations; there are {known}")
    for result in accuracy_bench.run(only or known, threads, tokens):
        errors = ", ".join(f"{kind} {error:.4f}" for kind, error in result.layer_errors.items())
        typer.echo(
            f"{result.name:<42}{result.perplexity:9.2f}  {result.bits_per_weight:5.2f} bits"
            f"{result.seconds:7.0f} s  peak {result.peak_bytes / 2**30:.2f} GiB  {errors}"
        )
        if json_path is not None:
            with json_path.open("a") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    app()
