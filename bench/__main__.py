"""``python -m bench``: one command per benchmark, JSON lines with ``--json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import accuracy as accuracy_bench
from bench import gemm as gemm_bench
from bench import roofline as paper
from fp4compile.lowering.gpus import GPUS, gpu_by_name

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
    device: Annotated[str, typer.Option(help="cpu, or cuda on a machine with a GPU.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """One linear layer: FP4 beside bf16 and fp32, activation quantization included.

    On a GPU that the table of lowering/gpus.py knows, the computed bound of "fp4 w4a4" as well.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch sees no GPU for --device {device}")
    shapes = [(int(n), int(k)) for n, k in (text.lower().split("x") for text in shape)]
    for result in gemm_bench.run(shapes, m, threads, repetitions, device):
        timing = result.timing
        typer.echo(
            f"{result.N}x{result.K} M={result.M:<4} {result.name:<18}"
            f"{timing.median * 1e3:9.3f} ms ({timing.low * 1e3:.3f} to {timing.high * 1e3:.3f})"
            f"{result.gops:9.1f} GOPS, weights read at {result.bandwidth_share:.0%} of bandwidth"
        )
        if device != "cpu" and result.name == "fp4 w4a4":
            typer.echo(_computed(result.M, result.N, result.K))
        if json_path is not None:
            with json_path.open("a") as lines:
                lines.write(json.dumps(result.to_json()) + "\n")


def _computed(M: int, N: int, K: int) -> str:
    name = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if name not in GPUS:
        return f"{'':24}no datasheet of {name} in lowering/gpus.py"
    gpu = GPUS[name]
    seconds = max(paper.memory_seconds(gpu, M, N, K), paper.compute_seconds(gpu, M, N, K))
    return f"{'':24}the datasheet of {gpu.product} allows {seconds * 1e3:.3f} ms"


@app.command()
def roofline(
    target: Annotated[
        list[str] | None, typer.Option(help="A GPU, as sm_90; repeatable. All without.")
    ] = None,
) -> None:
    """Bounds of GPU kernels from datasheets and compiled code; computed, not measured."""
    names = [gpu_by_name(name).name for name in target or GPUS]
    typer.echo(paper.markdown(list(paper.run(names))))


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
