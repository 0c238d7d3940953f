"""Replace every decided site's parameter by packed codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.formats import by_name
from fp4compile.numerics import power_of_two, quantize
from fp4compile.packing import pack
from fp4compile.passes.plan import Rewrite, oriented
from fp4compile.qparams import SiteQParams
from fp4compile.tensor import FP4Tensor


def swap_weights(rewrite: Rewrite) -> Rewrite:
    """Quantize and pack the weight of every site that has a decision."""
    parameters = dict(rewrite.parameters)
    for site in rewrite.graph.sites:
        if site.name not in rewrite.qparams:
            continue
        weight = oriented(rewrite.model, site.name, site.transposed)
        packed = fp4_weight(
            weight,
            rewrite.qparams[site.name],
            rewrite.model.get_parameter(site.name).dtype,
            row_shift=rewrite.row_shifts.get(site.name),
            transposed=site.transposed,
        )
        parameters.update(dict.fromkeys(site.aliases, packed))
    return replace(rewrite, parameters=parameters)


def fp4_weight(
    weight: Tensor,
    qparams: SiteQParams,
    dtype: torch.dtype,
    *,
    row_shift: Tensor | None = None,
    transposed: bool = False,
) -> FP4Tensor:
    """Pack ``weight`` float32 ``[N, K]`` by ``qparams``; ``transposed`` is its logical layout."""
    fmt = by_name(qparams.weight.format)
    scale = qparams.weight.scale
    codes = quantize(weight, fmt, scale[:, None])
    activation = qparams.activation
    return FP4Tensor(
        pack(codes, fmt.bits),
        scale if row_shift is None else scale * power_of_two(-row_shift),
        None if activation is None else activation.scale,
        None if activation is None else activation.exponent_shift,
        weight_format=fmt.name,
        activation_format=None if activation is None else activation.format,
        granularity="tensor" if activation is None else activation.granularity,
        shift_folded=activation is not None and activation.shift_folded,
        reduction=weight.shape[1],
        transposed=transposed,
        dtype=dtype,
    )
