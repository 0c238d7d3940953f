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
from bench import calibrate as calibrate_bench
from bench import digits as digits_bench
from bench import families as families_bench
from bench import gemm as gemm_bench
from bench import model as model_bench
from bench import roofline as paper
from bench import static_bound as bound_bench
from bench import sts as sts_bench
from bench.compare import DEFAULT_NOISE
from bench.compare import compare as compare_files
from bench.configurations import CONFIGURATIONS
from bench.gemm_peers import GEMM_PEERS, absent
from bench.machine import Rate, measure_machine
from bench.peers import MODELS, PEERS
from fp4compile.commands.options import TaskDir, TaskLimit
from fp4compile.lowering.gpus import GPUS, gpu_by_name
from fp4compile.search import METHODS

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
    """One linear layer: FP4 beside bf16, fp32 and other libraries' 4-bit layers, activation
    quantization included.

    On a GPU that the table of lowering/gpus.py knows, the computed bound of "fp4 w4a4" as well.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch sees no GPU for --device {device}")
    shapes = [(int(n), int(k)) for n, k in (text.lower().split("x") for text in shape)]
    for name in GEMM_PEERS if device == "cpu" else ():
        if (reason := absent(name)) is not None:
            typer.echo(f"{name} skipped: {reason}", err=True)
    for result in gemm_bench.run(shapes, m, threads, repetitions, device):
        timing, peak = result.timing, result.peak_share
        typer.echo(
            f"{result.N}x{result.K} M={result.M:<4} {result.name:<18}"
            f"{timing.median * 1e3:9.3f} ms ({timing.low * 1e3:.3f} to {timing.high * 1e3:.3f})"
            f"{result.gops:9.1f} GOPS, weights read at {result.bandwidth_share:.0%} of bandwidth"
            + ("" if peak is None else f", {peak:.0%} of the int8 peak")
        )
        if device != "cpu" and result.name == "fp4 w4a4":
            typer.echo(_computed(result.M, result.N, result.K))
        _append(json_path, result.to_json())


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
def model(
    name: Annotated[
        str, typer.Option("--model", help=f"One of {', '.join(MODELS)}.")
    ] = "smollm2-135m",
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A candidate; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads for everybody.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    batch: Annotated[list[int], typer.Option(min=1, help="Batch size; repeatable.")] = [1],  # noqa: B006
    new: Annotated[int, typer.Option(help="Tokens decoded per turn.")] = 32,
    repetitions: Annotated[int, typer.Option(help="Turns per candidate.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """A whole model: prefill and decode, compile time cold and warm, peak memory."""
    (name,) = _known([name], MODELS)
    names = _known(only, PEERS)
    for result in model_bench.run(
        names, name, threads, prompt=prompt, batches=batch, new=new, repetitions=repetitions
    ):
        if isinstance(result, model_bench.Skipped):
            typer.echo(f"{result.name:<22}skipped: {result.reason}")
            continue
        warm = "" if result.compile_warm is None else f", warm {result.compile_warm:.0f}"
        typer.echo(
            f"{result.name:<22}batch {result.batch}  prefill {_spread(result.prefill)}  "
            f"decode {_spread(result.decode)} tokens/s  "
            f"token {result.token_ms_p50:.2f} ms, 95% below {result.token_ms_p95:.2f}  "
            f"first call {result.compile_cold:.0f} s{warm}  "
            f"peak {result.peak_bytes / 2**30:.2f} GiB"
        )
        _append(json_path, result.to_json())


def _spread(rate: Rate) -> str:
    return f"{rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f})"


@app.command()
def accuracy(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A configuration; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of WikiText-2 test to score.")] = (
        accuracy_bench.TOKENS
    ),
    task: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval to score as well; repeatable.")
    ] = None,
    task_dir: TaskDir = None,
    limit: TaskLimit = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Quantize this decoder layer only; repeatable.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """SmolLM2-135M quantized in many ways: perplexity, layer errors, time and peak memory."""
    names = _known(only, accuracy_bench.CONFIGURATIONS)
    scoring = accuracy_bench.Scoring(
        tokens, tuple(task or ()), None if task_dir is None else str(task_dir.resolve()), limit
    )
    for result in accuracy_bench.run(names, threads, scoring, layer or ()):
        errors = ", ".join(f"{kind} {error:.4f}" for kind, error in result.layer_errors.items())
        typer.echo(
            f"{result.name:<42}{result.perplexity:9.2f}  {result.bits_per_weight:5.2f} bits"
            f"  KL {1e3 * result.divergence:.1f} ± {1e3 * result.divergence_error:.1f} millinats"
            f"{result.seconds:7.0f} s  peak {result.peak_bytes / 2**30:.2f} GiB  {errors}"
        )
        for name, metrics in result.tasks.items():
            typer.echo(f"  {name}: {', '.join(f'{k} {v:.4f}' for k, v in metrics.items())}")
        _append(json_path, asdict(result))


@app.command()
def bound(
    bits: Annotated[int, typer.Option(help="Bits of the activations: 4, 6 or 8.")] = 6,
    tokens: Annotated[int, typer.Option(help="Tokens of WikiText-2 test to score.")] = (
        accuracy_bench.TOKENS
    ),
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """SmolLM2-135M with inputs of linears rounded by static scales of every channel that are best
    for the scored tokens: more freedom than any recipe has.
    """
    torch.set_num_threads(threads)
    for result in bound_bench.run(bits, tokens):
        typer.echo(f"{result.bits} bits, inputs of {result.inputs:<12}{result.perplexity:9.2f}")
        _append(json_path, asdict(result))


@app.command()
def calibrate(
    spec: Annotated[str, typer.Option(help="A preset.")] = "w4a4",
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "fpq",
    layers: Annotated[list[int], typer.Option(min=1, help="Layers; repeatable.")] = [1, 2, 4],  # noqa: B006
    hidden: Annotated[list[int], typer.Option(min=64, help="Channels; repeatable.")] = [576],  # noqa: B006
    sequences: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """Llamas of several sizes, random weights: seconds and peak memory of calibration."""
    (method,) = _known([method], METHODS)
    for result in calibrate_bench.run(spec, method, layers, hidden, sequences, length, threads):
        typer.echo(
            f"{result.layers:3} layers of {result.hidden}: {result.weights / 1e6:7.1f} M weights"
            f"{result.seconds:8.1f} s{result.seconds / result.weights * 1e6:7.2f} s per million"
            f"  peak {result.peak_bytes / 2**30:.2f} GiB, model {result.model_bytes / 2**30:.2f}"
        )
        _append(json_path, asdict(result))


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
    for result in sts_bench.run(_known(only, CONFIGURATIONS), data, threads):
        typer.echo(
            f"{result.name:<20}{result.spearman:8.4f}  {result.bits_per_weight:5.2f} bits"
            f"{result.seconds:7.0f} s"
        )
        _append(json_path, asdict(result))


@app.command()
def digits(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A configuration; repeatable. All without.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Append JSON lines.")] = None,
) -> None:
    """A vision transformer trained here on scikit-learn's digits, quantized: top-1 accuracy."""
    for result in digits_bench.run(_known(only, CONFIGURATIONS), threads):
        typer.echo(
            f"{result.name:<20}{result.accuracy:7.2f} %  {result.bits_per_weight:5.2f} bits"
            f"{result.seconds:7.0f} s"
        )
        _append(json_path, asdict(result))


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


def _append(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a") as lines:
            lines.write(json.dumps(result) + "\n")


@app.command()
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
    _append(json_path, found.to_json())


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
