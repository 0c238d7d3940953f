"""``python -m bench``: one command per benchmark, JSON lines with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import accuracy as accuracy_bench
from bench import digits as digits_bench
from bench import families as families_bench
from bench import gemm as gemm_bench
from bench import sts as sts_bench
from bench.compare import DEFAULT_NOISE
from bench.compare import compare as compare_files
from bench.machine import measure_machine

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


def machine(
    threads: Annotated[int, typer.Option(help="Threads.")] = torch.get_num_threads(),
    json_path: Annotated[Path | None, typer.Option("--json", help="Append a JSON line.")] = None,
) -> None:
    """Describe this machine and measure its bandwidth and peaks: what results stand beside."""
    found = measure_machine(threads)
    described = found.machine
    typer.echo(f"{described.cpu}, {threads} threads, {', '.join(described.cpu_features)}")
    typer.echo(f"reads {found.read_bandwidth.median / 1e9:.1f} GB/s")
    for name, rate in found.peaks.items():
        typer.echo(f"GEMM in {name:<9}{rate.median / 1e9:9.1f} GOPS")
    if json_path is not None:
        with json_path.open("a") as lines:
            lines.write(json.dumps(found.to_json()) + "\n")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON lines of an earlier run.")],
    after: Annotated[Path, typer.Argument(help="JSON lines of the same benchmark, later.")],
    noise: Annotated[
        float, typer.Option(min=0, help="Change of a median that does not count.")
    ] = DEFAULT_NOISE,
) -> None:
    """What became worse or better beyond noise; exit code 1 if anything became worse."""
    try:
        found = compare_files(before, after, noise)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for change in found.changes:
        if change.verdict != "same":
            typer.echo(
                f"{change.verdict}: {change.row}: {change.metric} {change.before.median:.4g} -> "
                f"{change.after.median:.4g} ({change.ratio:.2f} times as bad)"
            )
    only = len(found.only_before), len(found.only_after)
    typer.echo(
        f"{len(found.changes)} measurements in both, {len(found.regressions)} worse; "
        f"rows only in the first: {only[0]}, only in the second: {only[1]}"
    )
    raise typer.Exit(1 if found.regressions else 0)


if __name__ == "__main__":
    app()
