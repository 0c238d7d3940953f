"""``python -m bench``: one command per benchmark, JSON lines with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import accuracy as accuracy_bench
from bench import digits as digits_bench
from bench import families as families_bench
from bench import gemm as gemm_bench
from bench import sts as sts_bench

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


@app.command()
def sts(
    data: Annotated[Path, typer.Argument(help="JSON lines with text_a, text_b and score.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A configuration; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """MiniLM quantized in many ways: Spearman correlation with human scores of similarity."""
    for result in sts_bench.run(_known(only, sts_bench.CONFIGURATIONS), data, threads):
        typer.echo(
            f"{result.name:<20}{result.spearman:8.4f}  {result.bits_per_weight:5.2f} bits"
            f"{result.seconds:7.0f} s"
        )
        _append(json_path, result)


@app.command()
def digits(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A configuration; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """A vision transformer trained here on scikit-learn's digits, quantized: top-1 accuracy."""
    for result in digits_bench.run(_known(only, digits_bench.CONFIGURATIONS), threads):
        typer.echo(
            f"{result.name:<20}{result.accuracy:7.2f} %  {result.bits_per_weight:5.2f} bits"
            f"{result.seconds:7.0f} s"
        )
        _append(json_path, result)


@app.command()
def families(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A family; repeatable. All without.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Put the table into this page of the docs.")
    ] = None,
) -> None:
    """Tiny random models of every family: what is quantized, folded and kept, and the error."""
    found = []
    for result in families_bench.run(_known(only, families_bench.FAMILIES)):
        found.append(result)
        typer.echo(families_bench.table([result]).splitlines()[-1])
    if page is not None:
        families_bench.write_table(page, found)


def _known(only: list[str] | None, names: Iterable[str]) -> list[str]:
    known = list(names)
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown} are unknown; there are {known}")
    return only or known


def _append(path: Path | None, result: Any) -> None:
    if path is not None:
        with path.open("a") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    app()
