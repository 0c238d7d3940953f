"""Channels that get the same exponent shift, since one row of a producer yields them all."""

from __future__ import annotations

from torch import Tensor


def tied_sums(values: Tensor, ties: Tensor | None) -> Tensor:
    """``values`` ``[..., K]``, each summed over all channels of its number in ``ties`` ``[K]``."""
    if ties is None:
        return values
    sums = values.new_zeros(*values.shape[:-1], int(ties.max()) + 1)
    return sums.index_add_(-1, ties, values)[..., ties]


def tied_maxima(values: Tensor, ties: Tensor | None) -> Tensor:
    """``values`` ``[K]``, each the largest of all channels with its number in ``ties`` ``[K]``."""
    if ties is None:
        return values
    largest = values.new_zeros(int(ties.max()) + 1)
    return largest.scatter_reduce_(0, ties, values, "amax")[ties]
