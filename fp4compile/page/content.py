"""What the page shows, as plain values: from a report or recipe to rows of numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fp4compile.errors import ReportError
from fp4compile.evaluate import Spread
from fp4compile.measure import Benchmark
from fp4compile.qparams import SiteQParams
from fp4compile.recipe import Recipe
from fp4compile.report import Report

# A curve over channels is drawn from so many of them, evenly spaced in order of size.
CURVE_POINTS = 160
FULL_BITS = 16


@dataclass(frozen=True)
class Channels:
    """Largest magnitudes of an activation's K channels, ascending as ``before``, and the same
    channels once each was multiplied by 2^-exponent_shift (``after``, None without shifts); both
    thinned to :data:`CURVE_POINTS`. ``shifts`` counts channels by their shift.
    """

    before: tuple[float, ...]
    after: tuple[float, ...] | None
    shifts: Mapping[int, int]
    channels: int


@dataclass(frozen=True)
class Row:
    """One quantized weight. ``kind`` is what its counterparts in other layers have in common,
    ``layer`` the first number in its name. Errors are relative output errors.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    weight_format: str
    activation_format: str | None
    granularity: str | None
    rotation: int
    shift_folded_into: str | None
    bits: float
    error: float
    minmax_error: float
    weight_error: float | None
    activation_error: float | None
    channels: Channels | None
    kernel: str | None

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Point:
    """With the weights down to ``name`` (None: none) kept in 16 bits: bits per weight, and the
    mean relative output error of all layers.
    """

    name: str | None
    bits: float
    mean_error: float


@dataclass(frozen=True)
class Speed:
    """A benchmark: shape of the input, seconds of a forward, shares of the time by kind of work."""

    label: str
    threads: int
    quantized: Spread
    baseline: Spread
    baseline_dtype: str
    kinds: Mapping[str, float]


@dataclass(frozen=True)
class Page:
    """Everything on the page; ``curve`` goes from all quantized to all in 16 bits."""

    model: str
    method: str
    spec: Mapping[str, Any]
    seconds: float
    bits_per_weight: float
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    curve: tuple[Point, ...]
    speed: tuple[Speed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Page:
        """The inverse of :meth:`to_dict`.

        Raises:
            ReportError: ``content`` is something else.
        """
        try:
            parts = {
                "rows": tuple(_row_from(row) for row in content["rows"]),
                "curve": tuple(Point(**point) for point in content["curve"]),
                "speed": tuple(_speed_from(speed) for speed in content["speed"]),
            }
            return cls(**{**content, **parts})
        except (KeyError, TypeError) as error:
            raise ReportError(
                f"this is no report ({type(error).__name__} {error}); give what "
                "fp4compile quantize or report --json wrote"
            ) from error

    @property
    def kinds(self) -> list[str]:
        """In order of their first appearance."""
        return list(dict.fromkeys(row.kind for row in self.rows))

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    def median_error(self, kind: str) -> float:
        return median(row.error for row in self.of_kind(kind))


def _row_from(content: Mapping[str, Any]) -> Row:
    shape, channels = tuple(content["shape"]), content["channels"]
    return Row(**{**content, "shape": shape, "channels": channels and _channels_from(channels)})


def _channels_from(content: Mapping[str, Any]) -> Channels:
    after = content["after"]
    return Channels(
        tuple(content["before"]),
        None if after is None else tuple(after),
        # JSON has no other keys than text.
        {int(shift): count for shift, count in content["shifts"].items()},
        content["channels"],
    )


def _speed_from(content: Mapping[str, Any]) -> Speed:
    spreads = {name: Spread(**content[name]) for name in ("quantized", "baseline")}
    return Speed(**{**content, **spreads})


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
    kernels = said["kernels"]
    rows = tuple(
        _row(site, recipe.sites[site["name"]], kernels.get(site["name"])) for site in said["sites"]
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


def _row(said: Mapping[str, Any], decision: SiteQParams, kernel: Any) -> Row:
    diagnosis = decision.diagnosis
    number = re.search(r"\.(\d+)\.", said["name"])
    owner = said["name"].split(".")[-2:][0]
    return Row(
        said["name"],
        owner,
        int(number[1]) if number else None,
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


def sensitivity_curve(rows: tuple[Row, ...]) -> tuple[Point, ...]:
    """Weights put back to 16 bits one by one, those first whose error falls most per bit added.

    The mean counts a layer in 16 bits as 0; errors do not tell how they add up in the model.
    """
    total = sum(row.elements for row in rows)
    bits = sum(row.bits * row.elements for row in rows)
    error = sum(row.error for row in rows)
    points = [Point(None, bits / max(total, 1), error / max(len(rows), 1))]
    by_gain = sorted(rows, key=lambda row: row.error / (row.elements * (FULL_BITS - row.bits)))
    for row in reversed(by_gain):
        bits += (FULL_BITS - row.bits) * row.elements
        error -= row.error
        points.append(Point(row.name, bits / total, max(error, 0.0) / len(rows)))
    return tuple(points)
