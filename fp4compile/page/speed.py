"""How fast the compiled model is beside high precision, by the shape of its input."""

from __future__ import annotations

from fp4compile.page.content import Page, Speed
from fp4compile.page.svg import WIDTH, Figure, Scale, dot, drawing, line, number, rect, text, x_axis

LEFT, RIGHT, TOP, ROW_HEIGHT = 150, WIDTH - 60, 14, 34


def speedups(page: Page) -> Figure | None:
    """A dot per measured input: times as fast as the baseline, with the range of the runs."""
    if not page.speed:
        return None
    ratios = [value for speed in page.speed for value in _ratios(speed)]
    scale = Scale(0, max(1.0, *ratios) * 1.08, LEFT, RIGHT)
    bottom = TOP + ROW_HEIGHT * len(page.speed)
    dtype = page.speed[0].baseline_dtype
    parts = [x_axis(scale, TOP, bottom, f"times as fast as {dtype}, compiled", number)]
    parts.append(line(scale(1), TOP, scale(1), bottom, "link"))
    for index, speed in enumerate(page.speed):
        parts.append(_row(speed, scale, TOP + ROW_HEIGHT * (index + 0.5)))
    best = max(page.speed, key=lambda speed: _ratios(speed)[1])
    title = f"At input {best.label} it runs {_ratios(best)[1]:.2f} times as fast as {dtype}"
    caption = (
        f"Median, and the range from the slowest to the fastest of both; {best.threads} threads. "
        f"At {best.label} most time goes to: {_shares(best)}."
    )
    return Figure(title, caption, drawing(bottom + 46, parts, title))


def _ratios(speed: Speed) -> tuple[float, float, float]:
    """Least, median and largest speedup."""
    fast, slow = speed.quantized, speed.baseline
    return slow.low / fast.high, slow.median / fast.median, slow.high / fast.low


def _row(speed: Speed, scale: Scale, y: float) -> str:
    low, middle, high = _ratios(speed)
    tip = (
        f"{speed.label}: {1e3 * speed.quantized.median:.2f} ms, {speed.baseline_dtype} "
        f"{1e3 * speed.baseline.median:.2f} ms; {_shares(speed)}"
    )
    return "".join(
        [
            text(LEFT - 10, y + 4, speed.label, "label", "end"),
            rect(scale(low), y - 1.5, scale(high) - scale(low), 3, "m-muted"),
            dot(scale(middle), y, "m-main", tip),
            text(scale(high) + 8, y + 4, f"{middle:.2f}", "tick"),
        ]
    )


def _shares(speed: Speed) -> str:
    return ", ".join(f"{kind} {share:.0%}" for kind, share in list(speed.kinds.items())[:3])
