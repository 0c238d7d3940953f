"""What the page shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fp4compile.errors import ReportError
from fp4compile.evaluate import Spread

FULL_BITS = 16


@dataclass(frozen=True)
class Channels:
    """Largest magnitudes of an activation's K channels, ascending as ``before``, and the same
    channels once each was multiplied by 2^-exponent_shift (``after``, None without shifts); both
    thinned. ``shifts`` counts channels by their shift.
    """

    before: tuple[float, ...]
    after: tuple[float, ...] | None
    shifts: Mapping[int, int]
    channels: int


@dataclass(frozen=True)
class Row:
    """One quantized weight; ``kind`` and ``layer`` as ``names.py`` tells them. Errors are relative
    output errors.
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
