"""``fp4::quantize_activation``: activations to the operand of the low-bit GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.errors import SpecError
from fp4compile.formats import FloatFormat, by_name
from fp4compile.numerics import power_of_two, round_steps, scale_for_max

GRANULARITIES = ("tensor", "token")


def operand_dtype(fmt: FloatFormat) -> torch.dtype:
    """int8 where all integer values fit (exact int32 sums), else bfloat16 (exact products)."""
    return torch.int8 if fmt.fits_int8 else torch.bfloat16


@torch.library.custom_op("fp4::quantize_activation", mutates_args=())
def quantize_activation(
    x: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_folded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` so that ``x ~ operand * operand_scale``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        scale: float32, 0-d. Granularity ``"tensor"``: the static scale. ``"token"``: the clip
            ratio; each token's clipping maximum is its absolute maximum times the ratio.
        exponent_shift: int8 ``[K]`` in ``[0, max_shift]``, the per-channel exponent bias of
            LLM-FP4 (section 3.3), or None.
        format: a name in ``formats.FORMATS``.
        granularity: ``"tensor"`` (static) or ``"token"`` (dynamic).
        shift_folded: the producer of ``x`` already multiplied channel k by 2^-exponent_shift[k].

    Returns:
        ``operand`` ``[..., K]`` = ``integer_value(code) << exponent_shift``, int8 or bfloat16
        (:func:`operand_dtype`), and ``operand_scale`` float32, 0-d or ``[..., 1]``.

    Raises:
        UnknownFormatError, SpecError: no such format or granularity.
    """
    fmt = by_name(format)
    if granularity not in GRANULARITIES:
        raise SpecError(f"activation granularity {granularity!r} is not one of {GRANULARITIES}")
    values = x.to(torch.float32)
    if exponent_shift is not None and not shift_folded:
        values = values * power_of_two(-exponent_shift)
    if granularity == "token":
        operand_scale = scale_for_max(values.abs().amax(dim=-1, keepdim=True) * scale, fmt)
    else:
        operand_scale = scale.clone()
    rounded = round_steps(values * operand_scale.reciprocal(), fmt)
    if exponent_shift is not None:
        rounded = rounded * power_of_two(exponent_shift)
    return rounded.to(operand_dtype(fmt)), operand_scale


@quantize_activation.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_folded: bool = False,
) -> tuple[Tensor, Tensor]:
    operand = torch.empty_like(x, dtype=operand_dtype(by_name(format)))
    scale_shape = (*x.shape[:-1], 1) if granularity == "token" else ()
    return operand, x.new_empty(scale_shape, dtype=torch.float32)
