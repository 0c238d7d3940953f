"""The figures of the page, in order; each says its finding in its title."""

from __future__ import annotations

from collections.abc import Callable

from fp4compile.page.channels import channel_ranges, shift_shares, spreads
from fp4compile.page.content import Page
from fp4compile.page.errors import error_map, error_parts
from fp4compile.page.sensitivity import curve, ranking
from fp4compile.page.speed import speedups
from fp4compile.page.svg import Figure

FIGURES: tuple[Callable[[Page], Figure | None], ...] = (
    speedups,
    error_parts,
    error_map,
    channel_ranges,
    spreads,
    shift_shares,
    curve,
    ranking,
)


def figures(page: Page) -> list[Figure]:
    """Those that the page has data for."""
    drawn = (draw(page) for draw in FIGURES)
    return [figure for figure in drawn if figure is not None]
