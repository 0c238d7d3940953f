"""Largest absolute value of every channel."""

from __future__ import annotations

import torch
from torch import Tensor


class AbsMaxObserver:
    """``value`` float32 ``[K]``: max over all tokens seen of ``|x[:, k]|``."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.value = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        """See tokens ``[T, K]``."""
        self.value = torch.maximum(self.value, x.abs().amax(dim=0).to(torch.float32))

    def merge(self, other: AbsMaxObserver) -> None:
        self.value = torch.maximum(self.value, other.value)
