"""From a report, or the recipe that a run saved, to what the page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4compile.errors import ReportError
from fp4compile.names import kinds, layer_of
from fp4compile.page.content import Channels, Page, Row, Speed, sensitivity_curve
from fp4compile.qparams import SiteQParams
from fp4compile.recipe import Recipe
from fp4compile.report import Report
from fp4compile.timing import Benchmark

# A curve over channels is drawn from so many of them, evenly spaced in order of size.
CURVE_POINTS = 160


def page_of(source: Report | Recipe, benchmarks: Sequence[Benchmark] = ()) -> Page:
    """The page's content.

    Raises:
        ReportError: the recipe has no report, or a benchmark no baseline.
    """
    recipe = source.recipe if isinstance(source, Report) else source
    said = source.to_dict() if isinstance(source, Report) else recipe.report
    if not said:
        raise ReportError(
            "the recipe has no report: an older version of fp4compile made it; quantize again, "
            "with recipe= to keep its decisions"
        )
    kind_of = kinds(site["name"] for site in said["sites"])
    kernels = said["kernels"]
    rows = tuple(
        _row(site, kind_of[site["name"]], recipe.sites[site["name"]], kernels.get(site["name"]))
        for site in said["sites"]
    )
    return Page(
        said["model"],
        said["method"],
        json.loads(json.dumps(said["spec"])),  # lists, as in a recipe
        said["seconds"],
        said["bits_per_weight"],
        rows,
        dict(said["skipped"]),
        sensitivity_curve(rows),
        speeds(benchmarks),
    )


def speeds(benchmarks: Sequence[Benchmark]) -> tuple[Speed, ...]:
    """What the page shows of benchmarks.

    Raises:
        ReportError: one has no baseline.
    """
    return tuple(_speed(benchmark) for benchmark in benchmarks)


def _speed(benchmark: Benchmark) -> Speed:
    if benchmark.baseline is None or benchmark.baseline_dtype is None:
        raise ReportError(
            "a benchmark without a baseline says nothing about speed in comparison; measure it "
            "again with baseline=torch.bfloat16 (fp4compile bench --baseline bfloat16)"
        )
    shape = next(iter(benchmark.inputs.values()))
    return Speed(
        " x ".join(map(str, shape)),
        benchmark.threads,
        benchmark.quantized.seconds,
        benchmark.baseline.seconds,
        benchmark.baseline_dtype,
        benchmark.quantized.kinds,
    )


def _row(said: Mapping[str, Any], kind: str, decision: SiteQParams, kernel: Any) -> Row:
    diagnosis = decision.diagnosis
    return Row(
        said["name"],
        kind,
        layer_of(said["name"]),
        (said["shape"][0], said["shape"][1]),
        said["weight_format"],
        said["activation_format"],
        said["granularity"],
        said["rotation"],
        said["shift_folded_into"],
        8 * said["bytes"] / (said["shape"][0] * said["shape"][1]),
        said["error"],
        said["minmax_error"],
        None if diagnosis is None else diagnosis.weight_error,
        None if diagnosis is None else diagnosis.activation_error,
        None if diagnosis is None else _channels(diagnosis.channel_absmax, _shift(decision)),
        kernel and kernel["target"],
    )


def _shift(decision: SiteQParams) -> Tensor | None:
    return None if decision.activation is None else decision.activation.exponent_shift


def _channels(absmax: Tensor, shift: Tensor | None) -> Channels:
    absmax = torch.tensor(_short(absmax))  # as a recipe keeps it: the page is the same from both
    order = absmax.argsort()
    if len(order) > CURVE_POINTS:
        # The largest channel is the one that matters, so it must be among them.
        order = order[torch.linspace(0, len(order) - 1, CURVE_POINTS).round().long()]
    after = None if shift is None else absmax * torch.exp2(-shift.float())
    counts = {} if shift is None else dict(zip(*_counted(shift), strict=True))
    return Channels(
        _short(absmax[order]), None if after is None else _short(after[order]), counts, len(absmax)
    )


def _counted(shift: Tensor) -> tuple[list[int], list[int]]:
    values, counts = shift.unique(return_counts=True)
    return values.tolist(), counts.tolist()


def _short(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values.tolist())
