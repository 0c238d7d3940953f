"""What a search method gets: one group of sites that share an activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fp4compile.qparams import QuantSpec, Statistics, WeightQParams


@dataclass(frozen=True)
class GroupProblem:
    """``weights``: float32 ``[N, K]`` by site name; ``statistics`` of their common input.

    ``decided`` holds weights that may not change any more (a head tied to an embedding that
    earlier layers were already calibrated on).
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics
    spec: QuantSpec
    decided: Mapping[str, WeightQParams] = field(default_factory=dict)
