"""Search methods: ``search(GroupProblem) -> {site: SiteQParams}``, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fp4compile.errors import SpecError
from fp4compile.qparams import SiteQParams
from fp4compile.search.fpq import fpq, fpq_baseline, minmax
from fp4compile.search.problem import GroupProblem

SearchMethod = Callable[[GroupProblem], Mapping[str, SiteQParams]]

METHODS: dict[str, SearchMethod] = {"minmax": minmax, "fpq_baseline": fpq_baseline, "fpq": fpq}


def by_method(name: str) -> SearchMethod:
    """The search called ``name``.

    Raises:
        SpecError: there is no such method.
    """
    if name not in METHODS:
        raise SpecError(f"unknown method {name!r}; methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "GroupProblem", "SearchMethod", "by_method"]
