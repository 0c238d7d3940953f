"""Where the error is: by kind of layer and its causes, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from fp4compile.page.content import Page, Row
from fp4compile.page.svg import (
    WIDTH,
    Figure,
    Scale,
    dot,
    drawing,
    line,
    log_scale,
    percent,
    rect,
    text,
    x_axis,
)

LEFT, RIGHT, TOP = 150, WIDTH - 20, 14
ROW_HEIGHT = 30


def error_parts(page: Page) -> Figure | None:
    """From min-max to what remains, and what of that weights and activations cause alone."""
    if not page.rows:
        return None
    kinds = sorted(page.kinds, key=page.median_error, reverse=True)
    found = {kind: _medians(page.of_kind(kind)) for kind in kinds}
    scale = log_scale([value for values in found.values() for value in values], LEFT, RIGHT)
    bottom = TOP + ROW_HEIGHT * len(kinds)
    parts = [x_axis(scale, TOP, bottom, "relative error of the layer's output", percent)]
    for index, kind in enumerate(kinds):
        parts.append(_dumbbell(kind, found[kind], scale, TOP + ROW_HEIGHT * (index + 0.5)))
    worst = kinds[0]
    title = f"{worst} loses most: {percent(page.median_error(worst))} of its output's power"
    if len(kinds) > 1:
        title += f"; {kinds[-1]} least, {percent(page.median_error(kinds[-1]))}"
    caption = (
        "Median over the layers of a kind, on calibration tokens. From standard formats scaled to "
        "the largest value (min-max) to what the search decided; the small marks say how much "
        "error there would be with only the weights, or only the activations, rounded (on fewer "
        "tokens, so one of them may lie above both together)."
    )
    legend = [
        ("m-muted", "min-max"),
        ("m-main", "decided"),
        ("m-weight", "weights alone"),
        ("m-activation", "activations alone"),
    ]
    return Figure(title, caption, drawing(bottom + 46, parts, title), legend)


def _medians(rows: Sequence[Row]) -> tuple[float, float, float, float]:
    """(min-max, decided, weights alone, activations alone); 0 for what is not known."""
    return (
        median(row.minmax_error for row in rows),
        median(row.error for row in rows),
        median(row.weight_error or 0.0 for row in rows),
        median(row.activation_error or 0.0 for row in rows),
    )


def _dumbbell(kind: str, errors: tuple[float, float, float, float], scale: Scale, y: float) -> str:
    base, decided, of_weight, of_activation = errors
    tip = f"{kind}: min-max {percent(base)}, decided {percent(decided)}"
    parts = [
        text(LEFT - 10, y + 4, kind, "label", "end"),
        line(scale(base), y, scale(decided), y, "link"),
        dot(scale(base), y, "m-muted", f"{kind}, min-max: {percent(base)}"),
    ]
    for name, style, value in (
        ("weights", "m-weight", of_weight),
        ("activations", "m-activation", of_activation),
    ):
        if value > 0:
            said = f"{kind}, {name} alone: {percent(value)}"
            parts.append(rect(scale(value) - 1.5, y - 8, 3, 16, style, said))
    return "".join([*parts, dot(scale(decided), y, "m-main", tip)])


def error_map(page: Page) -> Figure | None:
    """A square per weight: kinds down, layers across, stronger for more error."""
    rows = [row for row in page.rows if row.layer is not None]
    layers = sorted({row.layer for row in rows if row.layer is not None})
    if len(layers) < 2:
        return None
    kinds = list(dict.fromkeys(row.kind for row in rows))
    width = min(26.0, (RIGHT - LEFT) / len(layers))
    shade = _shade([row.error for row in rows])
    parts = []
    for index, kind in enumerate(kinds):
        parts.append(text(LEFT - 10, TOP + 26 * index + 17, kind, "label", "end"))
    for row in rows:
        x = LEFT + width * layers.index(row.layer or 0)
        y = TOP + 26 * kinds.index(row.kind)
        parts.append(rect(x + 0.5, y + 0.5, width - 1, 25, "cell", _tip(row), shade(row.error)))
    bottom = TOP + 26 * len(kinds)
    for index, layer in enumerate(layers):
        if index % max(1, len(layers) // 10) == 0:
            x = LEFT + width * (index + 0.5)
            parts.append(text(x, bottom + 16, str(layer), "tick", "middle"))
    parts.append(text(LEFT + width * len(layers) / 2, bottom + 36, "layer", "axis", "middle"))
    worst = max(rows, key=lambda row: row.error)
    title = f"The worst weight is {worst.name.removesuffix('.weight')}: {percent(worst.error)}"
    caption = "Relative output error of every weight: the stronger the colour, the larger (log)."
    return Figure(title, caption, drawing(bottom + 46, parts, title))


def _shade(errors: Sequence[float]) -> _Shade:
    positive = [error for error in errors if error > 0] or [1.0]
    return _Shade(math.log(min(positive)), math.log(max(positive)))


class _Shade:
    """Opacity of an error, between a visible minimum and full."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, error: float) -> float:
        if error <= 0 or self.high <= self.low:
            return 0.08
        return 0.08 + 0.92 * (math.log(error) - self.low) / (self.high - self.low)


def _tip(row: Row) -> str:
    activation = f", activation {row.activation_format}" if row.activation_format else ""
    return f"{row.name}: error {percent(row.error)}, weight {row.weight_format}{activation}"
