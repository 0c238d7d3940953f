"""Small SVG charts as strings. Colours are classes, so that both themes work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 680


@dataclass(frozen=True)
class Scale:
    """From values in ``low..high`` to pixels in ``start..end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the range, a handful."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def log_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """From the tick below all positive ``values`` to the one above."""
    positive = [value for value in values if value > 0] or [1.0]
    ticks = _rounds(min(positive) / 10, max(positive) * 10, (1, 2, 5))
    low = max(tick for tick in ticks if tick <= min(positive))
    high = min(tick for tick in ticks if tick > max(positive))
    return Scale(low, high, start, end, log=True)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade, or powers of ten where these would be many."""
    decades = math.log10(high / low)
    return _rounds(low, high, (1, 2, 5)) if decades < 4 else _rounds(low, high, (1,), decades // 6)


def _rounds(low: float, high: float, steps: tuple[int, ...], stride: float = 1) -> list[float]:
    """``steps`` times powers of ten within the range, every ``stride``-th power."""
    powers = range(
        math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, max(1, int(stride))
    )
    found = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in found if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step)
    count = math.floor(high / step) - first + 1
    return [round((first + index) * step, 10) for index in range(count)]


@dataclass(frozen=True)
class Figure:
    """A drawing with its finding as title. ``legend``: (class of the mark, what it means)."""

    title: str
    caption: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()


def drawing(height: float, parts: Iterable[str], label: str) -> str:
    """The whole drawing; ``label`` is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def rect(
    x: float, y: float, width: float, height: float, style: str, tip: str = "", opacity: float = 1
) -> str:
    faded = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" '
        f'class="{style}"{faded}{_tip(tip)}/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def dot(x: float, y: float, style: str, tip: str = "", radius: float = 4.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{style}"{_tip(tip)}/>'


def path(points: Sequence[tuple[float, float]], style: str) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{drawn}" class="{style}"/>'


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    classes = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{classes}>{escape(content)}</text>'


def _tip(tip: str) -> str:
    return f' data-tip="{escape(tip)}" tabindex="0"' if tip else ""


def x_axis(
    scale: Scale, top: float, bottom: float, title: str, label: Callable[[float], str] = str
) -> str:
    """Grid lines and labels below, with what they measure."""
    parts = []
    for tick in scale.ticks():
        parts.append(line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(text(scale(tick), bottom + 16, label(tick), "tick", "middle"))
    parts.append(text((scale.start + scale.end) / 2, bottom + 36, title, "axis", "middle"))
    return "".join(parts)


def y_axis(
    scale: Scale, left: float, right: float, title: str, label: Callable[[float], str] = str
) -> str:
    """Grid lines and labels at the left, with what they measure above."""
    parts = [text(left, scale.end - 10, title, "axis")]
    for tick in scale.ticks():
        parts.append(line(left, scale(tick), right, scale(tick), "grid"))
        parts.append(text(left - 6, scale(tick) + 4, label(tick), "tick", "end"))
    return "".join(parts)


def percent(value: float) -> str:
    """A share with about two significant digits."""
    if value <= 0:
        return "0%"
    digits = max(0, 1 - math.floor(math.log10(100 * value)))
    return f"{100 * value:.{min(digits, 4)}f}%"


def number(value: float) -> str:
    """Without an exponent, as labels of axes need it."""
    return f"{value:,.10g}"


def rounded(value: float) -> str:
    """To two significant digits, without an exponent."""
    return number(float(f"{value:.2g}"))
