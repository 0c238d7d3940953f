"""Quantization error of every channel under many clipping maxima and formats, by sorting once.

Within a format's cell all values round to one grid point, so the cell's squared error needs only
its sums of 1, |x| and x^2; over sorted magnitudes those are differences of prefix sums. After one
sort per activation any (format, maximum) costs one look-up per cell, on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.formats import FloatFormat

# So many at a time: the prefix sums are three float64 per value.
CHANNELS = 64


def channel_errors(
    x: Tensor, token_weight: Tensor, maxima: Tensor, formats: Sequence[FloatFormat]
) -> list[Tensor]:
    """Weighted mean squared error ``[len(maxima), K]`` per format of clipping at each maximum.

    Args:
        x: ``[T, K]``.
        token_weight: ``[T]``, how much a token counts.
    """
    parts = []
    for channels in x.abs().split(CHANNELS, dim=1):
        magnitude, sums = _prefix_sums(channels, token_weight)
        parts.append([_errors(magnitude, sums, maxima, fmt) for fmt in formats])
    return [torch.cat(of_format, dim=1) for of_format in zip(*parts, strict=True)]


def _prefix_sums(channels: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending magnitudes float32 ``[K, T]``, and float64 ``[3, K, T + 1]``: prefix sums of the
    token weights times 1, |x| and x^2.
    """
    magnitude, order = channels.t().contiguous().sort(dim=1)
    weight = token_weight[order].to(torch.float64)
    moments = torch.stack((weight, weight * magnitude, weight * magnitude.square()))
    return magnitude, F.pad(moments.cumsum(dim=2), (1, 0))


def _errors(magnitude: Tensor, sums: Tensor, maxima: Tensor, fmt: FloatFormat) -> Tensor:
    channels, tokens = magnitude.shape
    scales = maxima.to(torch.float32) / fmt.max_integer
    bounds = (scales[:, None] * torch.tensor(fmt.thresholds)).flatten()
    edges = torch.searchsorted(magnitude, bounds.expand(channels, -1).contiguous())
    edges = edges.view(channels, len(maxima), -1)
    first = torch.zeros(channels, len(maxima), 1, dtype=edges.dtype)
    edges = torch.cat((first, edges, torch.full_like(first, tokens)), dim=-1)
    at_edges = sums.gather(2, edges.flatten(1).expand(3, -1, -1))
    count, linear, square = at_edges.view(3, *edges.shape).diff(dim=-1)
    grid = scales.to(torch.float64)[:, None] * torch.tensor(fmt.magnitudes, dtype=torch.float64)
    error = square - 2 * grid * linear + grid.square() * count
    return (error.sum(dim=-1) / sums[0, 0, -1]).t().to(torch.float32)
