"""Squared outputs of a layer, of which only differences matter where the layer is a head.

The logits of a head go into a softmax, which takes a change that is common to all of them away: the
outputs of a head are compared with their mean over the outputs taken off ("centred").
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_power(x: Tensor, weight: Tensor, *, centred: bool) -> Tensor:
    """``|x W^T|^2`` of every token ``[T]``, by the weight's Gram matrix where that is cheaper."""
    rows, channels = weight.shape
    if min(len(x), rows) < channels:
        y = x @ weight.t()
        return (y - y.mean(dim=1, keepdim=True) if centred else y).square().sum(dim=1)
    gram = weight.t() @ weight
    if centred:
        total = weight.sum(dim=0)
        gram.addr_(total, total, alpha=-1 / rows)
    return (x @ gram * x).sum(dim=1)


class SquaredOutputs:
    """Sum of the squares of outputs ``[T, N]`` that come in parts along N."""

    def __init__(self, *, centred: bool) -> None:
        self._centred = centred
        self._square = 0.0
        self._sum = torch.zeros(())
        self._outputs = 0

    def add(self, part: Tensor) -> None:
        self._square += float(part.square().sum())
        self._outputs += part.shape[1]
        if self._centred:
            self._sum = self._sum + part.sum(dim=1)

    @property
    def total(self) -> float:
        return self._square - float(self._sum.square().sum()) / max(1, self._outputs)
