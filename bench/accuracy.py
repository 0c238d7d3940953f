"""Perplexity, layer errors, time and memory of quantizing the demo model in many ways.

Each configuration runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fp4compile
from bench.process import peak_bytes, run_module
from fp4compile.batches import bundled
from fp4compile.demo_model import load_demo_model
from fp4compile.evaluate import divergence
from fp4compile.qparams import QuantSpec, TensorSpec
from fp4compile.search import SearchOptions
from fp4compile.tasks import run_tasks
from fp4compile.texts import text_ids

TOKENS = 8176
# The plain error of the calibration tokens, all alike.
EQUAL_TOKENS = SearchOptions(
    sink_power=float("inf"), weight_sink_power=float("inf"), unseen=0.0, moment_shrinkage=0.0
)
PAPER = replace(
    EQUAL_TOKENS,
    rounding="nearest",
    shift_choice="maximum",
    lookup_weight=1.0,
    format_margin=0.0,
    balance=False,
)
GRADIENT = SearchOptions(token_weights="gradient")
NEAREST = SearchOptions(rounding="nearest")
ROTATED = SearchOptions(rotate=True)
# How the paper's code was run on this model: 2 sequences of 128 tokens of the calibration text.
REFERENCE_SEQUENCES, REFERENCE_LENGTH = 2, 128


def _spec(preset: str) -> QuantSpec:
    name, _, token = preset.partition("-")
    spec = QuantSpec.preset(name)
    return spec.per_token() if token == "token" else spec


def _nvfp4() -> QuantSpec:
    block = TensorSpec(4, ("e2m1",), "block", block_size=16)
    return QuantSpec(block, block, block)


def _blocks_of_16(preset: str) -> QuantSpec:
    """Weights and embeddings with half a bit of scales per value."""
    block = TensorSpec(4, ("e2m1", "e1m2"), "block", block_size=16)
    return QuantSpec(block, _spec(preset).activation, block)


def _wide_weights(preset: str) -> QuantSpec:
    """Weights and embeddings of 8 bits, activations of ``preset``: what is lost to these alone."""
    wide = _spec("w8a8")
    return replace(wide, activation=_spec(preset).activation)


def _per_channel_weights(preset: str) -> QuantSpec:
    """Naming the formats keeps ``best`` from taking block scales."""
    spec = _spec(preset)
    weight = replace(spec.weight, formats=("e2m1", "e1m2"))
    assert spec.activation is not None
    activation = replace(spec.activation, formats=("e2m1", "e1m2"))
    return QuantSpec(weight, activation, weight)


@dataclass(frozen=True)
class Configuration:
    """One way to quantize; ``method`` None keeps full precision. ``reference_inputs``: calibrated
    on what the paper's code was calibrated on.
    """

    spec: QuantSpec
    method: str | None
    options: SearchOptions = field(default_factory=SearchOptions)
    sequential: bool = False
    reference_inputs: bool = False


CONFIGURATIONS: dict[str, Configuration] = {
    "full precision": Configuration(_spec("w4a4"), None),
    "w4a4 minmax": Configuration(_spec("w4a4"), "minmax"),
    "w4a4 fpq_baseline": Configuration(_spec("w4a4"), "fpq_baseline", PAPER),
    "w4a4 fpq as in the paper": Configuration(_spec("w4a4"), "fpq", PAPER),
    "w4a4 fpq, rounded to nearest": Configuration(_spec("w4a4"), "fpq", NEAREST),
    "w4a4 fpq": Configuration(_spec("w4a4"), "fpq"),
    "w4a4 fpq, sequential": Configuration(_spec("w4a4"), "fpq", sequential=True),
    "w4a4 fpq, per token": Configuration(_spec("w4a4-token"), "fpq"),
    "w4a8 fpq": Configuration(_spec("w4a8"), "fpq"),
    "w4a8 fpq, no shifts in weights": Configuration(
        _spec("w4a8"), "fpq", SearchOptions(balance=False)
    ),
    "w4a16 fpq": Configuration(_spec("w4a16"), "fpq"),
    "w4a16 fpq, look-ups count as the head": Configuration(
        _spec("w4a16"), "fpq", SearchOptions(lookup_weight=1.0)
    ),
    "w6a6 fpq": Configuration(_spec("w6a6"), "fpq"),
    "w6a6 fpq, per token": Configuration(_spec("w6a6-token"), "fpq"),
    "w6a6 fpq, per token, rotated": Configuration(_spec("w6a6-token"), "fpq", ROTATED),
    "w4a4 fpq, per token, rotated": Configuration(_spec("w4a4-token"), "fpq", ROTATED),
    "w6a6 fpq, weights of 8 bits": Configuration(_wide_weights("w6a6"), "fpq"),
    "w8a8 fpq": Configuration(_spec("w8a8"), "fpq"),
    "w4a4 fpq_baseline on the reference's inputs": Configuration(
        _spec("w4a4"), "fpq_baseline", EQUAL_TOKENS, reference_inputs=True
    ),
    "w4a4 fpq on the reference's inputs": Configuration(
        _spec("w4a4"), "fpq", EQUAL_TOKENS, reference_inputs=True
    ),
    "NVFP4, rounded to nearest": Configuration(_nvfp4(), "minmax"),
    "w4a4 best": Configuration(_spec("w4a4"), "best"),
    "w4a4 best, rounded to nearest": Configuration(_spec("w4a4"), "best", NEAREST),
    "w4a4 best, no rotation": Configuration(
        _spec("w4a4"), "best", SearchOptions(largest_rotation=1)
    ),
    "w4a4 best, no shifts": Configuration(_spec("w4a4"), "best", SearchOptions(balance=False)),
    "w4a4 best, scales per channel and token": Configuration(
        _per_channel_weights("w4a4-token"), "best"
    ),
    "w4a8 best": Configuration(_spec("w4a8"), "best"),
    "w4a4 best, tokens by gradient": Configuration(_spec("w4a4"), "best", GRADIENT),
    "w4a8 best, tokens by gradient": Configuration(_spec("w4a8"), "best", GRADIENT),
    "w4a8 best, blocks of 16, tokens by gradient": Configuration(
        _blocks_of_16("w4a8"), "best", GRADIENT
    ),
    "w4a16 best": Configuration(_spec("w4a16"), "best"),
    "w6a6 best": Configuration(_spec("w6a6"), "best"),
}


@dataclass(frozen=True)
class AccuracyResult:
    """``divergence``: of the next token's probabilities from those of full precision, in nats, and
    its standard error. ``layer_errors``: median relative output error by the last module name of
    the weight. ``peak_bytes`` of the process until the model was quantized, of which
    ``model_bytes`` is the model in float32. ``tasks``: what lm-eval scored, by task and metric.
    ``layers``: the decoder layers that were quantized, where not the whole model was.
    """

    name: str
    perplexity: float
    tokens: int
    divergence: float
    divergence_error: float
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    model_bytes: int
    threads: int
    layer_errors: dict[str, float]
    tasks: dict[str, dict[str, float]]
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class Scoring:
    """``tokens`` of WikiText-2 test; ``limit`` questions (None: all) of every task of lm-eval, of
    which ``task_dir`` may have more.
    """

    tokens: int = TOKENS
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    limit: int | None = None


def run(
    names: Sequence[str], threads: int, scoring: Scoring, layers: Sequence[int] = ()
) -> Iterator[AccuracyResult]:
    """A result per configuration, each measured in a new process. ``layers``: as in
    :class:`AccuracyResult`; a few take minutes where the whole model takes an hour.
    """
    for name in names:
        chosen = json.dumps(asdict(scoring)), json.dumps(layers)
        yield AccuracyResult(**run_module("bench.accuracy", name, threads, *chosen))


def measure(name: str, scoring: Scoring, layers: Sequence[int] = ()) -> AccuracyResult:
    """Quantize and evaluate in this process."""
    configuration = CONFIGURATIONS[name]
    model, tokenizer = load_demo_model(None, torch.float32)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    start = time.perf_counter()
    if configuration.method is not None:
        fp4compile.quantize(
            model,
            _reference_inputs(tokenizer) if configuration.reference_inputs else None,
            spec=configuration.spec,
            method=configuration.method,
            search=configuration.options,
            sequential=configuration.sequential,
            tokenizer=tokenizer,
            targets=[f"model.layers.{layer}.*" for layer in layers] or None,
        )
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    ids = text_ids(tokenizer, bundled("heldout.txt"))
    full_precision, _ = load_demo_model(None, torch.float32)
    result = divergence(model, full_precision, ids, max_tokens=scoring.tokens, progress=True)
    report: Any = getattr(model, "fp4_report", None)
    return AccuracyResult(
        name,
        result.perplexity,
        result.tokens,
        result.divergence,
        result.standard_error,
        16.0 if report is None else report.bits_per_weight,
        seconds,
        peak,
        model_bytes,
        torch.get_num_threads(),
        {} if report is None else _layer_errors(report),
        _scores(model, tokenizer, scoring) if scoring.tasks else {},
        layers,
    )


def _scores(model: Any, tokenizer: Any, scoring: Scoring) -> dict[str, dict[str, float]]:
    """Of the eager model, in the dtype in which it was quantized."""
    folder = None if scoring.task_dir is None else Path(scoring.task_dir)
    return run_tasks(model, tokenizer, scoring.tasks, limit=scoring.limit, task_dir=folder)


def _reference_inputs(tokenizer: Any) -> list[torch.Tensor]:
    ids = text_ids(tokenizer, bundled("calibration.txt"))
    return [ids[0, : REFERENCE_SEQUENCES * REFERENCE_LENGTH].view(-1, REFERENCE_LENGTH)]


def _layer_errors(report: Any) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for site in report.sites:
        by_kind.setdefault(site.name.split(".")[-2], []).append(site.error)
    return {kind: median(errors) for kind, errors in by_kind.items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    chosen = Scoring(**json.loads(sys.argv[3])), json.loads(sys.argv[4])
    print(json.dumps(asdict(measure(sys.argv[1], *chosen))))
