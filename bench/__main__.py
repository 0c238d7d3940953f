"""``python -m bench``: one command per benchmark, JSON lines with ``--json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench import gemm as gemm_bench

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


if __name__ == "__main__":
    app()
