"""What the passes decide, and the one place that changes the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fp4compile.blocks import block_scales, rescaled_blocks
from fp4compile.numerics import power_of_two
from fp4compile.qparams import SiteQParams, WeightQParams
from fp4compile.trace import Graph, Site


@dataclass(frozen=True)
class Rewrite:
    """The traced model, the decision per site, and what the passes derived from them.

    ``parameters``: new value by parameter name (tied names map to one object).
    ``row_shifts``: int8 ``[N]`` by site; the site's outputs are to be multiplied by 2^-row_shift.
    ``folded``: names of the sites whose exponent shifts a producer absorbed, by the producer.
    ``unfolded``: why the shifts of the other sites are multiplied as their activation is rounded.
    """

    model: nn.Module
    graph: Graph
    qparams: Mapping[str, SiteQParams]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    row_shifts: Mapping[str, Tensor] = field(default_factory=dict)
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unfolded: Mapping[str, str] = field(default_factory=dict)


def commit(rewrite: Rewrite) -> None:
    """Put the new parameters into the model and freeze all others (FP4 is for inference)."""
    made: dict[int, nn.Parameter] = {}
    for name, value in rewrite.parameters.items():
        owner_name, _, attribute = name.rpartition(".")
        # Tied names were given the same value and must stay one parameter.
        parameter = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
        setattr(rewrite.model.get_submodule(owner_name), attribute, parameter)
    rewrite.model.requires_grad_(False)


def oriented(model: nn.Module, site: Site) -> Tensor:
    """The parameter as float32 ``[N, K]``; ``[E, N, K]`` of a stack of experts."""
    weight = model.get_parameter(site.name).detach().to(torch.float32)
    if site.patch:
        return weight.flatten(1)
    return weight.mT.contiguous() if site.transposed else weight


def shifted_scales(weight: WeightQParams, row_shift: Tensor) -> tuple[Tensor, Tensor | None]:
    """(scale, block scale codes) for outputs that are to be multiplied by 2^-row_shift ``[N]``."""
    factor = power_of_two(-row_shift)
    if weight.block_scale is None:
        return weight.scale * factor, None
    return weight.scale, rescaled_blocks(weight.block_scale, factor[:, None])


def can_shift(weight: WeightQParams, row_shift: Tensor) -> bool:
    """Whether :func:`shifted_scales` is exact: E4M3 block scales may leave their range."""
    if weight.block_scale is None:
        return True
    _, codes = shifted_scales(weight, row_shift)
    assert codes is not None
    exact = block_scales(weight.block_scale, weight.scale) * power_of_two(-row_shift)[:, None]
    return torch.equal(block_scales(codes, weight.scale), exact)
