"""Observers: ``update(x)``, ``merge(other)``, then read their value. One file each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fp4compile.observers.absmax import AbsMaxObserver
from fp4compile.observers.sample import SampleObserver
from fp4compile.observers.second_moment import SecondMomentObserver
from fp4compile.qparams import SAMPLE_TOKENS, Statistics


class ActivationObserver:
    """All that is observed of one activation of K channels. ``moment`` costs ``K^2`` memory and
    as much time per token, so only who needs it asks for it. The i-th update is batch
    ``first + i * stride``.
    """

    def __init__(
        self,
        channels: int,
        sample_tokens: int,
        *,
        second_moment: bool = False,
        first: int = 0,
        stride: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.absmax = AbsMaxObserver(channels, device)
        self.sample = SampleObserver(
            channels, sample_tokens, first=first, stride=stride, device=device
        )
        self.moment = SecondMomentObserver(channels, device) if second_moment else None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """See tokens ``[T, K]`` of the next batch."""
        self.absmax.update(x)
        self.sample.update(x)
        if self.moment is not None:
            self.moment.update(x)
        self.tokens += x.shape[0]

    @property
    def value(self) -> Statistics:
        """What was seen; an empty second moment where none was asked for."""
        moment = torch.empty(0, 0) if self.moment is None else self.moment.value
        return Statistics(self.absmax.value, moment, self.sample.value, self.tokens)


def watch(inputs: Iterable[Tensor], sample_tokens: int, **options: Any) -> ActivationObserver:
    """Watch one activation ``[tokens, K]``, a batch at a time; no batch is kept.

    Args:
        options: those of :class:`ActivationObserver`.
    """
    observer: ActivationObserver | None = None
    for x in inputs:
        if observer is None:
            observer = ActivationObserver(x.shape[-1], sample_tokens, device=x.device, **options)
        observer.update(x)
    assert observer is not None  # there is no calibration without batches
    return observer


def observe(inputs: Iterable[Tensor], sample_tokens: int = SAMPLE_TOKENS) -> Statistics:
    """Statistics of one activation from its values ``[tokens, K]`` in every batch."""
    return watch(inputs, sample_tokens).value


__all__ = [
    "AbsMaxObserver",
    "ActivationObserver",
    "SampleObserver",
    "SecondMomentObserver",
    "observe",
    "watch",
]
