"""Observers: ``update(x)``, ``merge(other)``, then read their value. One file each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fp4compile.observers.absmax import AbsMaxObserver
from fp4compile.observers.sample import SampleObserver
from fp4compile.observers.second_moment import SecondMomentObserver
from fp4compile.qparams import Statistics

# All tokens of the default calibration; a sample of longer ones.
SAMPLE_TOKENS = 8192


def observe(inputs: Sequence[Tensor], sample_tokens: int = SAMPLE_TOKENS) -> Statistics:
    """Statistics of one activation from its values ``[tokens, K]`` in every batch."""
    channels = inputs[0].shape[-1]
    absmax, moment = AbsMaxObserver(channels), SecondMomentObserver(channels)
    sample = SampleObserver(channels, sample_tokens)
    for x in inputs:
        for observer in (absmax, moment, sample):
            observer.update(x)
    return Statistics(absmax.value, moment.value, sample.value, moment.tokens)


__all__ = ["AbsMaxObserver", "SampleObserver", "SecondMomentObserver", "observe"]
