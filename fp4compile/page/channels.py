"""Activations: how unlike their channels are, and what exponent shifts do about it."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from statistics import median

from fp4compile.page.content import Channels, Page, Row
from fp4compile.page.svg import (
    WIDTH,
    Figure,
    Scale,
    dot,
    drawing,
    line,
    log_scale,
    number,
    path,
    percent,
    rect,
    rounded,
    text,
    x_axis,
    y_axis,
)

PANELS_ACROSS, PANEL_HEIGHT, GAP = 2, 150, 64
PANEL_PITCH = PANEL_HEIGHT + 76
LEFT, RIGHT, TOP = 150, WIDTH - 20, 24
LEGEND = (("m-muted", "as the model makes it"), ("m-main", "after the exponent shift"))


def _shifted(page: Page) -> list[Row]:
    """One row per activation with shifts: siblings that read the same one count once."""
    found: dict[tuple[float, ...], Row] = {}
    for row in page.rows:
        if row.channels is not None and row.channels.after is not None:
            found.setdefault((row.layer or 0, *row.channels.before), row)
    return list(found.values())


def octaves(values: Sequence[float]) -> float:
    """How far the largest channel lies above the median one, in powers of two."""
    positive = [value for value in values if value > 0]
    return log2(max(positive) / median(positive)) if positive else 0.0


def _most_spread(rows: Sequence[Row]) -> list[Row]:
    """The row of every kind whose channels differ most, those that differ most first."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.kind not in best or _before(row) > _before(best[row.kind]):
            best[row.kind] = row
    return sorted(best.values(), key=_before, reverse=True)[:4]


def _before(row: Row) -> float:
    return 0.0 if row.channels is None else octaves(row.channels.before)


def _label(row: Row) -> str:
    return row.kind if row.layer is None else f"{row.kind}, layer {row.layer}"


def _after(row: Row) -> float:
    return octaves((row.channels and row.channels.after) or ())


def channel_ranges(page: Page) -> Figure | None:
    """Panels of channel maxima before and after, of the most uneven activations."""
    chosen = _most_spread(_shifted(page))
    if not chosen:
        return None
    width = (WIDTH - 40 - GAP * (PANELS_ACROSS - 1) - 30) / PANELS_ACROSS
    parts = []
    for index, row in enumerate(chosen):
        assert row.channels is not None
        x = 54 + (width + GAP) * (index % PANELS_ACROSS)
        y = 40 + PANEL_PITCH * (index // PANELS_ACROSS)
        parts.append(panel(row, row.channels, x, y, width))
    rows_of_panels = (len(chosen) + PANELS_ACROSS - 1) // PANELS_ACROSS
    first = chosen[0]
    title = (
        f"The largest channel into {_label(first)} is {rounded(2 ** _before(first))} times the "
        f"median one; after the shift {rounded(2 ** _after(first))} times"
    )
    caption = (
        "Largest magnitude of every channel on the calibration tokens, channels in order of it. A "
        "4-bit number spans few powers of two, so one scale for all channels wastes it on the few "
        "large ones; a shift per channel brings them together, and is undone exactly in the "
        "product. Of every kind the layer with the most uneven channels."
    )
    return Figure(title, caption, drawing(PANEL_PITCH * rows_of_panels, parts, title), LEGEND)


def panel(row: Row, channels: Channels, left: float, top: float, width: float) -> str:
    """Maxima of the channels of one activation, before (line) and after the shift (dots)."""
    assert channels.after is not None
    bottom = top + PANEL_HEIGHT
    ys = log_scale([*channels.before, *channels.after], bottom, top)
    xs = Scale(0, len(channels.before) - 1, left, left + width)
    before = [(xs(index), ys(value)) for index, value in enumerate(channels.before)]
    after = [(xs(index), ys(value)) for index, value in enumerate(channels.after)]
    tip = (
        f"{row.name}: largest over median 2^{_before(row):.1f} before, 2^{_after(row):.1f} after "
        f"the shift, {channels.channels} channels"
    )
    return "".join(
        [
            y_axis(ys, left, left + width, "max |x|", number),
            text(left + width, top - 10, _label(row), "label", "end"),
            rect(left, top, width, PANEL_HEIGHT, "hit", tip),
            path(before, "c-muted"),
            *(dot(x, y, "m-main", radius=1.6) for x, y in after),
            text(left + width / 2, bottom + 18, "channels, by max |x|", "tick", "middle"),
        ]
    )


def spreads(page: Page) -> Figure | None:
    """Of every activation: octaves of its largest channel, before and after."""
    rows = _shifted(page)
    if len(rows) < 3:
        return None
    top, bottom, left = 34, 220, 54
    ys = Scale(0, max(1.0, *map(_before, rows)), bottom, top)
    xs = Scale(0, len(rows) - 1, left + 8, RIGHT)
    parts = [y_axis(ys, left, RIGHT, "largest over median channel, powers of two", number)]
    for index, row in enumerate(rows):
        before, after = _before(row), _after(row)
        tip = f"input of {row.name}: 2^{before:.1f} before, 2^{after:.1f} after the shift"
        parts.append(line(xs(index), ys(before), xs(index), ys(after), "link"))
        parts.append(dot(xs(index), ys(before), "m-muted", tip, 2.6))
        parts.append(dot(xs(index), ys(after), "m-main", tip, 2.6))
    middle = (left + RIGHT) / 2
    parts.append(text(middle, bottom + 24, "activations in order of execution", "axis", "middle"))
    gain = median(_before(row) - _after(row) for row in rows)
    title = f"Shifts take {gain:.1f} powers of two off the spread of a typical activation"
    caption = "One line per activation that has exponent shifts; siblings that share it count once."
    return Figure(title, caption, drawing(bottom + 36, parts, title), LEGEND)


def shift_shares(page: Page) -> Figure | None:
    """Stacked shares of channels by their shift, per kind."""
    rows = _shifted(page)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    if not kinds:
        return None
    totals = {kind: _counts([row for row in rows if row.kind == kind]) for kind in kinds}
    most = max(abs(shift) for counts in totals.values() for shift in counts)
    scale = Scale(0, 1, LEFT, RIGHT)
    bottom = TOP + 28 * len(kinds)
    parts = [x_axis(scale, TOP, bottom, "share of channels", percent)]
    for index, kind in enumerate(kinds):
        parts.append(_shares(kind, totals[kind], most, scale, TOP + 28 * index))
    all_counts = _counts(rows)
    moved = 1 - all_counts.get(0, 0) / max(sum(all_counts.values()), 1)
    title = f"{percent(moved)} of all channels are shifted"
    caption = (
        "Channels by their integer exponent shift, from none (faint) to the largest (strong): the "
        "channel is divided by 2^shift before it is rounded."
    )
    return Figure(title, caption, drawing(bottom + 46, parts, title))


def _counts(rows: Sequence[Row]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for row in rows:
        assert row.channels is not None
        for shift, count in row.channels.shifts.items():
            counts[int(shift)] = counts.get(int(shift), 0) + count
    return dict(sorted(counts.items()))


def _shares(kind: str, counts: dict[int, int], most: int, scale: Scale, y: float) -> str:
    parts = [text(LEFT - 10, y + 18, kind, "label", "end")]
    done, total = 0, sum(counts.values())
    for shift, count in counts.items():
        x, end = scale(done / total), scale((done + count) / total)
        tip = f"{kind}: shift {shift} for {count} of {total} channels ({percent(count / total)})"
        opacity = 0.12 + 0.88 * abs(shift) / max(most, 1)
        parts.append(rect(x + 0.5, y + 3, end - x - 1, 22, "cell", tip, opacity))
        done += count
    return "".join(parts)
