"""A uniform sample of tokens (reservoir sampling), reproducible from its seed."""

from __future__ import annotations

import torch
from torch import Tensor


class SampleObserver:
    """``value`` float32 ``[min(tokens seen, size), K]``: every token seen is equally likely.

    Each token draws a random key and the ``size`` smallest keys stay, so two reservoirs merge
    by the same rule.
    """

    def __init__(self, channels: int, size: int, seed: int = 0) -> None:
        self.size = size
        self.value = torch.empty(0, channels)
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        """See tokens ``[T, K]``."""
        keys = torch.rand(x.shape[0], generator=self._generator)
        self._keep(keys, x)

    def merge(self, other: SampleObserver) -> None:
        self._keep(other._keys, other.value)

    def _keep(self, keys: Tensor, x: Tensor) -> None:
        all_keys = torch.cat((self._keys, keys))
        kept = all_keys.argsort()[: self.size].sort().values
        held = self._keys.shape[0]
        old, new = kept[kept < held], kept[kept >= held] - held
        self.value = torch.cat((self.value[old], x[new].to(torch.float32)))
        self._keys = all_keys[kept]
