"""Format and per-output-channel clipping of one weight, by the error of the layer output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat
from fp4compile.numerics import fake_quantize, scale_for_max
from fp4compile.qparams import WeightQParams
from fp4compile.search.grid import clip_factors
from fp4compile.weights import ROWS

STEPS_PER_OCTAVE = 8
OCTAVES_BELOW = 1.125
# Candidates per row that get the exact objective, after ranking by its diagonal.
EXACT_CANDIDATES = 3
# Then the best scale is refined by these exponents, halving the grid's step twice.
REFINEMENTS = (1 / 16, 1 / 32)
# Rows that a tensor's format is chosen on.
FORMAT_ROWS = 64


@dataclass(frozen=True)
class OutputError:
    """Quadratic output error of a candidate weight row ``v`` in place of ``w``:

    ``v A v^T - 2 v B w^T + w H w^T`` with ``A`` = E[x_hat x_hat^T], ``B`` = E[x_hat x^T] and
    ``H`` = E[x x^T]; without activation quantization all three are H.
    """

    quantized_moment: Tensor
    cross_moment: Tensor

    @classmethod
    def of_inputs(cls, moment: Tensor) -> OutputError:
        """Inputs in full precision."""
        return cls(moment, moment)

    @classmethod
    def of_samples(cls, x_hat: Tensor, x: Tensor) -> OutputError:
        """Inputs ``x`` ``[T, K]`` that the layer sees as ``x_hat``."""
        return cls(x_hat.t() @ x_hat, x_hat.t() @ x)

    def rows_of(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """For rows ``weight`` ``[N, K]``: a candidate's error of every row ``[N]``, less what no
        candidate changes (``w H w^T``).
        """
        if self.cross_moment is self.quantized_moment:

            def of_difference(candidate: Tensor) -> Tensor:
                difference = candidate - weight
                return (difference @ self.quantized_moment).mul_(difference).sum(dim=1)

            return of_difference
        cross = 2 * weight @ self.cross_moment.t()

        def of_candidate(candidate: Tensor) -> Tensor:
            return (candidate @ self.quantized_moment).sub_(cross).mul_(candidate).sum(dim=1)

        return of_candidate

    def rows(self, candidate: Tensor, weight: Tensor) -> Tensor:
        """:meth:`rows_of` for one candidate."""
        return self.rows_of(weight)(candidate)

    def diagonal_rows(self, candidate: Tensor, weight: Tensor) -> Tensor:
        """:meth:`rows` without the correlation between channels, K times cheaper."""
        # The row's target is what would be best without rounding if channels were uncorrelated.
        ideal = weight * (self.cross_moment.diagonal() / self.quantized_moment.diagonal())
        return (candidate - ideal.nan_to_num_()).square() @ self.quantized_moment.diagonal()


def search_weight(
    weight: Tensor, objective: OutputError, formats: Sequence[FloatFormat]
) -> WeightQParams:
    """The format (per tensor) and scales (per row) with the least output error.

    Args:
        weight: float32 ``[N, K]``.
    """
    fmt = formats[0] if len(formats) == 1 else _best_format(weight, objective, formats)
    scales = [_search_rows(rows, objective, fmt) for rows in weight.split(ROWS)]
    return WeightQParams(fmt.name, torch.cat(scales))


def _search_rows(weight: Tensor, objective: OutputError, fmt: FloatFormat) -> Tensor:
    """The best scale of every row ``[N]``."""
    errors_of = objective.rows_of(weight)
    scale, error = _best_of(weight, errors_of, fmt, _shortlist(weight, objective, fmt))
    for step in REFINEMENTS:
        around = torch.stack((scale * 2.0**step, scale * 2.0**-step))
        moved, moved_error = _best_of(weight, errors_of, fmt, around)
        scale = torch.where(moved_error < error, moved, scale)
        error = torch.minimum(moved_error, error)
    return scale


def _best_format(
    weight: Tensor, objective: OutputError, formats: Sequence[FloatFormat]
) -> FloatFormat:
    """The format of least error on some of the rows."""
    some = weight[:: max(1, len(weight) // FORMAT_ROWS)]
    errors_of = objective.rows_of(some)

    def error(fmt: FloatFormat) -> float:
        _, errors = _best_of(some, errors_of, fmt, _shortlist(some, objective, fmt))
        return float(errors.sum())

    return min(formats, key=error)


def _shortlist(weight: Tensor, objective: OutputError, fmt: FloatFormat) -> Tensor:
    """The most promising scales ``[candidates, N]`` of every row by the objective's diagonal."""
    minmax = scale_for_max(weight.abs().amax(dim=1), fmt)
    factors = clip_factors(STEPS_PER_OCTAVE, OCTAVES_BELOW)
    errors = torch.stack(
        [
            objective.diagonal_rows(fake_quantize(weight, fmt, (minmax * f)[:, None]), weight)
            for f in factors
        ]
    )
    # Min-max stays a candidate whatever the diagonal says of it.
    errors[(factors == 1.0).nonzero()[0]] = -torch.inf
    shortlist = errors.topk(min(EXACT_CANDIDATES, len(factors)), dim=0, largest=False).indices
    return minmax * factors[shortlist]


def _best_of(
    weight: Tensor, errors_of: Callable[[Tensor], Tensor], fmt: FloatFormat, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """(scale ``[N]``, exact error ``[N]``) of the best of ``scales`` for every row."""
    errors = torch.stack([errors_of(fake_quantize(weight, fmt, s[:, None])) for s in scales])
    error, index = errors.min(dim=0)
    return scales.gather(0, index[None])[0], error
