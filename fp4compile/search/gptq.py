"""Error-compensated rounding (GPTQ, Frantar et al., arXiv 2210.17323) on any format and scale.

Columns are rounded in turn, the most important first; what a column's rounding adds to the layer
output is taken back by the columns not yet rounded. Then every column is rounded anew, given what
became of all others: coordinate descent (as QuantEase, Behdin et al., arXiv 2309.01885), which
never adds to the error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fp4compile.blocks import in_second_format, per_channel
from fp4compile.formats import FloatFormat, alternatives
from fp4compile.numerics import round_finite
from fp4compile.qparams import WeightQParams
from fp4compile.search.weight import OutputError
from fp4compile.weights import ROWS, channel_scales, row_parts, steps_to_packed

# Of the mean diagonal, added to the diagonal of the moment (the paper's value).
DAMPING = 0.01
# Columns whose compensation of later ones is gathered into one matrix product.
LAZY_COLUMNS = 64
# Around a row's scale that is best for rounding to nearest; two thirds of rows are better off with
# another once errors are compensated.
SCALE_FACTORS = (1.0, 0.9, 1 / 0.9)
# Sweeps of coordinate descent over the columns; a third would gain another percent.
SWEEPS = 2
# Of the mean diagonal: channels that are always zero keep their codes.
LEAST_POWER = 1e-6


@dataclass(frozen=True, eq=False)
class Compensation:
    """What rounding by the second moment ``[K, K]`` of an activation shares among its weights."""

    moment: Tensor

    @cached_property
    def _elimination(self) -> tuple[Tensor, Tensor]:
        return _elimination(self.moment)

    def rounded(self, weight: Tensor, qparams: WeightQParams) -> WeightQParams:
        """``qparams`` with the codes of compensated rounding of ``weight`` ``[N, K]``; formats and
        scales stay.
        """
        packed = []
        for rows, part in row_parts(weight, qparams):
            steps = _round_rows(rows, *self._elimination, part)
            packed.append(steps_to_packed(_descended(rows, steps, self.moment, part), part))
        return replace(qparams, packed=torch.cat(packed))

    def rescaled(self, weight: Tensor, qparams: WeightQParams) -> WeightQParams:
        """:meth:`rounded`, every row with the best of :data:`SCALE_FACTORS` times its scale, which
        is per output channel.
        """
        size = ROWS // len(SCALE_FACTORS)
        parts = [self._best_scaled(*part) for part in row_parts(weight, qparams, size)]
        scale = torch.cat([part.scale for part in parts])
        packed = torch.cat([part.packed for part in parts if part.packed is not None])
        return replace(qparams, scale=scale, packed=packed)

    def _best_scaled(self, weight: Tensor, qparams: WeightQParams) -> WeightQParams:
        """All scales at once: columns are rounded one by one, so the more rows, the better."""
        scales = torch.cat([qparams.scale * factor for factor in SCALE_FACTORS])
        copies = weight.repeat(len(SCALE_FACTORS), 1)
        steps = _round_rows(copies, *self._elimination, replace(qparams, scale=scales))
        errors = OutputError.of_inputs(self.moment).rows(steps * scales[:, None], copies)
        best = errors.view(len(SCALE_FACTORS), -1).argmin(dim=0)
        chosen = best * len(weight) + torch.arange(len(weight))
        found = replace(qparams, scale=scales[chosen])
        steps = _descended(weight, steps[chosen], self.moment, found)
        return replace(found, packed=steps_to_packed(steps, found))


def _elimination(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the columns, and the upper Cholesky factor of the inverse moment in that order."""
    order = moment.diagonal().argsort(descending=True)
    damped = moment[order][:, order].to(torch.float64)
    # A channel that is always zero has no say; the smallest damping keeps it invertible.
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _round_rows(weight: Tensor, order: Tensor, factor: Tensor, qparams: WeightQParams) -> Tensor:
    """Steps ``[N, K]`` of compensated rounding."""
    channels = weight.shape[1]
    # Column j of the weight is row j here, so that every step works on contiguous memory.
    left = weight.t()[order]
    scales = channel_scales(qparams, channels).t().expand(channels, -1)[order]
    rounding = _Rounding.of(qparams, channels, order)
    steps = torch.empty_like(left)
    for start in range(0, channels, LAZY_COLUMNS):
        stop = min(start + LAZY_COLUMNS, channels)
        block, inverse = left[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j, diagonal in enumerate(inverse.diagonal().tolist()):
            column, scale, error = block[j], scales[start + j], errors[j]
            rounded = rounding.column(column / scale, start + j)
            steps[start + j] = rounded
            torch.addcmul(column, rounded, scale, value=-1, out=error).div_(diagonal)
            block[j + 1 :].addr_(inverse[j, j + 1 :], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(steps)
    result[order] = steps
    return result.t().contiguous()


def _descended(weight: Tensor, steps: Tensor, moment: Tensor, qparams: WeightQParams) -> Tensor:
    """``steps`` ``[N, K]`` after :data:`SWEEPS`, in which every column is rounded to the best that
    the others leave.
    """
    channels = weight.shape[1]
    # Column j of the weight is row j here, as in _round_rows.
    scales = channel_scales(qparams, channels).t().expand(channels, -1)
    rounding = _Rounding.of(qparams, channels, torch.arange(channels))
    steps = steps.t().contiguous()
    gradient = moment @ (steps * scales - weight.t())
    powers = moment.diagonal()
    least = LEAST_POWER * powers.mean()
    # By how many steps a slope of one moves a column: none that has no power.
    moves = torch.where(powers > least, powers.reciprocal(), torch.zeros(()))[:, None] / scales
    for start in list(range(0, channels, LAZY_COLUMNS)) * SWEEPS:
        stop = min(start + LAZY_COLUMNS, channels)
        block, within = gradient[start:stop], moment[start:stop, start:stop]
        changes = torch.empty_like(block)
        for j in range(stop - start):
            old = steps[start + j]
            wanted = torch.addcmul(old, block[j], moves[start + j], value=-1)
            rounded = rounding.column(wanted, start + j)
            torch.sub(rounded, old, out=changes[j]).mul_(scales[start + j])
            steps[start + j] = rounded
            block.addr_(within[:, j], changes[j])
        gradient[:start].addmm_(moment[:start, start:stop], changes)
        gradient[stop:].addmm_(moment[stop:, start:stop], changes)
    return steps.t().contiguous()


class _Rounding:
    """Rounds one column; rows whose block has the second format round in that."""

    def __init__(self, formats: tuple[FloatFormat, ...], second: Tensor | None) -> None:
        self.formats = formats
        self.second = second  # [K, N] in elimination order

    @classmethod
    def of(cls, qparams: WeightQParams, channels: int, order: Tensor) -> _Rounding:
        formats = alternatives(qparams.format)
        if len(formats) == 1 or qparams.block_scale is None:
            return cls(formats, None)
        flags = per_channel(in_second_format(qparams.block_scale), qparams.block_size, channels)
        return cls(formats, flags.t()[order])

    def column(self, steps: Tensor, position: int) -> Tensor:
        rounded = round_finite(steps, self.formats[0])
        if self.second is None:
            return rounded
        return torch.where(self.second[position], round_finite(steps, self.formats[1]), rounded)
