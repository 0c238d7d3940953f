"""What it would cost in bits to take error away: the curve, and the weights it begins with."""

from __future__ import annotations

from fp4compile.page.content import Page, Point
from fp4compile.page.svg import (
    WIDTH,
    Figure,
    Scale,
    dot,
    drawing,
    number,
    path,
    percent,
    rect,
    text,
    x_axis,
    y_axis,
)

LEFT, RIGHT, TOP, BOTTOM = 64, WIDTH - 20, 34, 270
LONGEST = 12


def curve(page: Page) -> Figure | None:
    """Bits per weight against the error that is left as weights go back to 16 bits."""
    points = page.curve
    if len(points) < 3 or points[0].mean_error <= 0:
        return None
    xs = Scale(points[0].bits, points[-1].bits, LEFT, RIGHT)
    ys = Scale(0, points[0].mean_error, BOTTOM, TOP)
    parts = [
        y_axis(ys, LEFT, RIGHT, "mean relative output error of the layers", percent),
        x_axis(xs, TOP, BOTTOM, "bits per weight", number),
        path([(xs(point.bits), ys(point.mean_error)) for point in points], "c-main"),
        *(dot(xs(p.bits), ys(p.mean_error), "m-main", _tip(p), 3) for p in points),
    ]
    half = next(point for point in points if point.mean_error <= points[0].mean_error / 2)
    title = (
        f"Half of the layers' error goes with {half.bits - points[0].bits:.1f} more bits per "
        f"weight: {points.index(half)} of {len(page.rows)} weights in 16 bits"
    )
    caption = (
        "An estimate from the errors of single layers: those weights go back to 16 bits first "
        "whose error falls most per bit. To try a point, quantize again with ignore= naming its "
        "weights, and measure."
    )
    return Figure(title, caption, drawing(BOTTOM + 46, parts, title))


def _tip(point: Point) -> str:
    kept = f"from {point.name} on" if point.name else "all quantized"
    return f"{kept}: {point.bits:.2f} bits per weight, mean error {percent(point.mean_error)}"


def ranking(page: Page) -> Figure | None:
    """The weights with the largest errors as bars."""
    rows = sorted(page.rows, key=lambda row: row.error, reverse=True)[:LONGEST]
    if len(rows) < 2:
        return None
    left, height = 300, 24
    scale = Scale(0, rows[0].error, left, RIGHT - 50)
    parts = []
    for index, row in enumerate(rows):
        y = 8 + height * index
        name = row.name.removesuffix(".weight")
        shown = name if len(name) <= 40 else f"...{name[-38:]}"
        tip = f"{row.name}: {percent(row.error)}, min-max {percent(row.minmax_error)}"
        parts.append(text(left - 8, y + 16, shown, "label", "end"))
        parts.append(rect(left, y + 3, scale(row.error) - left, height - 6, "cell", tip))
        parts.append(text(scale(row.error) + 6, y + 16, percent(row.error), "tick"))
    share = sum(row.error for row in rows) / max(sum(row.error for row in page.rows), 1e-30)
    title = (
        f"The {len(rows)} most sensitive weights hold {percent(share)} of the layers' summed error"
    )
    caption = (
        "Ranked by the relative error of the layer's own output on calibration tokens; how much "
        "the model as a whole suffers from each is not measured here."
    )
    return Figure(title, caption, drawing(16 + height * len(rows), parts, title))
