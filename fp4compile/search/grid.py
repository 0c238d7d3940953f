"""Candidate clipping maxima, as factors on a log2 grid: invariant to the tensor's scale.

The paper's code multiplies the exponent *bias* by factors instead, which makes the clipping range
depend on the tensor's magnitude and never tries min-max itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_factors(steps_per_octave: int, octaves_below: float, steps_above: int = 1) -> Tensor:
    """Descending factors ``2^(i / steps_per_octave)``; 1.0 (min-max) is one of them."""
    lowest = -round(octaves_below * steps_per_octave)
    exponents = torch.arange(steps_above, lowest - 1, -1) / steps_per_octave
    return torch.exp2(exponents)
