"""Streamed second moment of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMomentObserver:
    """``sum`` float32 ``[K, K]`` = sum over tokens of ``x x^T``; ``tokens`` counts them.

    It makes the output error of any candidate weight a quadratic form, whatever the number of
    tokens: ``E|x (w_hat - w)|^2 = (w_hat - w) H (w_hat - w)^T`` with ``H = sum / tokens``.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.sum = torch.zeros(channels, channels, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """See tokens ``[T, K]``."""
        x = x.to(torch.float32)
        self.sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]

    def merge(self, other: SecondMomentObserver) -> None:
        self.sum += other.sum
        self.tokens += other.tokens

    @property
    def value(self) -> Tensor:
        """H, the mean of ``x x^T``."""
        return self.sum / max(self.tokens, 1)
