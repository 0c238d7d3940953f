"""Search methods by name; each decides groups of sites, and weights that are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fp4compile.errors import SpecError
from fp4compile.qparams import SiteQParams, TensorSpec, WeightQParams
from fp4compile.search.best import best, best_embedding
from fp4compile.search.embedding import minmax_embedding, search_embedding
from fp4compile.search.fpq import fpq, fpq_baseline, minmax
from fp4compile.search.problem import GroupProblem, SearchOptions


@dataclass(frozen=True)
class SearchMethod:
    """``search_group`` decides the sites that read one activation; ``search_lookup`` a weight
    ``[N, K]`` that is looked up, given the second moment of its tied head's input where that head
    is decided with it.
    """

    search_group: Callable[[GroupProblem], Mapping[str, SiteQParams]]
    search_lookup: Callable[[Tensor, TensorSpec, Tensor | None, SearchOptions], WeightQParams]


METHODS: dict[str, SearchMethod] = {
    "minmax": SearchMethod(minmax, minmax_embedding),
    "fpq_baseline": SearchMethod(fpq_baseline, search_embedding),
    "fpq": SearchMethod(fpq, search_embedding),
    "best": SearchMethod(best, best_embedding),
}


def by_method(name: str) -> SearchMethod:
    """The search called ``name``.

    Raises:
        SpecError: there is no such method.
    """
    if name not in METHODS:
        raise SpecError(f"unknown method {name!r}; methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "GroupProblem", "SearchMethod", "SearchOptions", "by_method"]
