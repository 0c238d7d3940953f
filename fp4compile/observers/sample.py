"""A uniform sample of tokens (reservoir sampling), reproducible from its seed."""

from __future__ import annotations

import torch
from torch import Tensor

# Distinct generator seeds for as many batches per seed.
BATCHES_PER_SEED = 1_000_003


class SampleObserver:
    """``value`` float32 ``[min(tokens seen, size), K]``: every token seen is equally likely.

    Each token's key is drawn from its batch's number and the ``size`` smallest keys stay, so the
    sample and its order are the same however the batches are divided over reservoirs that merge.
    The i-th update sees batch ``first + i * stride``. ``keys``, ``order`` (batch, then position)
    and ``rows`` belong to each other.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        seed: int = 0,
        *,
        first: int = 0,
        stride: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.size = size
        # On the CPU, whose random numbers are the same everywhere.
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self.order = torch.empty(0, dtype=torch.int64, device="cpu")
        self.rows = torch.empty(0, channels, device=device)
        self._seed = seed * BATCHES_PER_SEED
        self._batch = first
        self._stride = stride

    @property
    def value(self) -> Tensor:
        """The sampled tokens in the order of the batches."""
        return self.rows[self.order.argsort()]

    def update(self, x: Tensor) -> None:
        """See tokens ``[T, K]`` of the next batch."""
        generator = torch.Generator().manual_seed(self._seed + self._batch)
        keys = torch.rand(x.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        self.keep(keys, (self._batch << 32) + torch.arange(x.shape[0], device="cpu"), x)
        self._batch += self._stride

    def merge(self, other: SampleObserver) -> None:
        self.keep(other.keys, other.order, other.rows)

    def keep(self, keys: Tensor, order: Tensor, rows: Tensor) -> None:
        """Add tokens, then drop those beyond the ``size`` smallest keys."""
        held = self.keys.shape[0]
        all_keys, all_order = torch.cat((self.keys, keys)), torch.cat((self.order, order))
        kept = all_keys.argsort()[: self.size].sort().values
        old, new = kept[kept < held], kept[kept >= held] - held
        self.rows = torch.cat((self.rows[old], rows[new].to(torch.float32)))
        self.keys, self.order = all_keys[kept], all_order[kept]
