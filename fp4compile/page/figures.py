"""The figures of the page, in order; each says its finding in its title."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp4compile.page.channels import channel_ranges, shift_shares, spreads
from fp4compile.page.content import Page
from fp4compile.page.errors import error_map, error_parts
from fp4compile.page.sensitivity import curve, ranking
from fp4compile.page.speed import speedups


@dataclass(frozen=True)
class Figure:
    """``legend``: (class of the mark, what it means)."""

    title: str
    caption: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()


def figures(page: Page) -> list[Figure]:
    """Those that the page has data for."""
    drawn = (draw(page) for draw in FIGURES)
    return [Figure(*made) for made in drawn if made is not None]


# What a figure function returns: title, caption, svg, legend.
Drawn = tuple[str, str, str, Sequence[tuple[str, str]]]
FIGURES: tuple[Callable[[Page], Drawn | None], ...] = (
    speedups,
    error_parts,
    error_map,
    channel_ranges,
    spreads,
    shift_shares,
    curve,
    ranking,
)
