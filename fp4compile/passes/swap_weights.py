"""Replace every decided site's parameter by packed codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.passes.plan import Rewrite, oriented, shifted_scales
from fp4compile.qparams import SiteQParams
from fp4compile.tensor import FP4Tensor
from fp4compile.weights import for_activation, packed_codes


def swap_weights(rewrite: Rewrite) -> Rewrite:
    """Quantize and pack the weight of every site that has a decision."""
    parameters = dict(rewrite.parameters)
    for site in rewrite.graph.sites:
        if site.name not in rewrite.qparams:
            continue
        packed = fp4_weight(
            oriented(rewrite.model, site),
            rewrite.qparams[site.name],
            rewrite.model.get_parameter(site.name).dtype,
            row_shift=rewrite.row_shifts.get(site.name),
            transposed=site.transposed,
            patch=site.patch,
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
    patch: tuple[int, ...] = (),
) -> FP4Tensor:
    """Pack ``weight`` float32 ``[N, K]`` (experts: ``[E, N, K]``) by ``qparams``; ``transposed``
    and ``patch`` are its logical layout.
    """
    activation, decided = qparams.activation, qparams.weight
    scale, block_scale = decided.scale, decided.block_scale
    if row_shift is not None:
        scale, block_scale = shifted_scales(decided, row_shift)
    return FP4Tensor(
        packed_codes(for_activation(weight, activation), decided),
        scale,
        None if activation is None else activation.scale,
        None if activation is None else activation.exponent_shift,
        block_scale,
        weight_format=decided.format,
        activation_format=None if activation is None else activation.format,
        granularity="tensor" if activation is None else activation.granularity,
        shift_folded=activation is not None and activation.shift_folded,
        shift_in_weight=activation is not None and activation.shift_in_weight,
        rotation=1 if activation is None else activation.rotation,
        block_size=decided.block_size,
        block_clip=1.0 if activation is None else activation.block_clip,
        reduction=weight.shape[-1],
        transposed=transposed,
        patch=patch,
        dtype=dtype,
    )
