"""Quantization error of every channel under many clipping maxima and formats, by sorting once.

Within a format's cell all values round to one grid point, so the cell's squared error needs only
its sums of 1, |x| and x^2; over sorted magnitudes those are differences of prefix sums. After one
sort per activation any (format, maximum) costs one look-up per cell, on all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat


@dataclass(frozen=True)
class SortedChannels:
    """``magnitude`` float32 ``[K, T]``, ascending; ``sums`` float64 ``[3, K, T + 1]``: prefix
    sums of the token weights times 1, |x| and x^2.
    """

    magnitude: Tensor
    sums: Tensor

    @classmethod
    def of(cls, x: Tensor, token_weight: Tensor) -> SortedChannels:
        """Sort ``x`` ``[T, K]``; token t counts ``token_weight[t]``."""
        magnitude, order = x.abs().t().contiguous().sort(dim=1)
        weight = token_weight[order].to(torch.float64)
        moments = torch.stack((weight, weight * magnitude, weight * magnitude.square()))
        sums = torch.nn.functional.pad(moments.cumsum(dim=2), (1, 0))
        return cls(magnitude, sums)

    def errors(self, maxima: Tensor, fmt: FloatFormat) -> Tensor:
        """Weighted mean squared error ``[len(maxima), K]`` of clipping at each of ``maxima``."""
        channels, tokens = self.magnitude.shape
        scales = maxima.to(torch.float32) / fmt.max_integer
        thresholds = torch.tensor(fmt.thresholds)
        bounds = (scales[:, None] * thresholds).flatten().expand(channels, -1).contiguous()
        edges = torch.searchsorted(self.magnitude, bounds).view(channels, len(maxima), -1)
        first = torch.zeros(channels, len(maxima), 1, dtype=edges.dtype)
        last = torch.full_like(first, tokens)
        edges = torch.cat((first, edges, last), dim=-1)
        at_edges = self.sums.gather(2, edges.flatten(1).expand(3, -1, -1))
        count, linear, square = at_edges.view(3, *edges.shape).diff(dim=-1)
        grid = scales.to(torch.float64)[:, None] * torch.tensor(fmt.magnitudes, dtype=torch.float64)
        error = square - 2 * grid * linear + grid.square() * count
        return (error.sum(dim=-1) / self.sums[0, 0, -1]).t().to(torch.float32)
