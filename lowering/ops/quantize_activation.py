"""fp4::quantize_activation in functional torch, so that Inductor fuses it with what produces x."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat, by_name
from fp4compile.lowering import inductor
from fp4compile.numerics import power_of_two, scale_for_max
from fp4compile.ops.quantize_activation import operand_dtype

FLOAT32_EXPONENT = 0x7F800000


@inductor.register_as_aten(torch.ops.fp4.quantize_activation.default)
def quantize_activation(
    x: Tensor,
    scale: Tensor,
    exponent_shift: Tensor | None,
    format: str,
    granularity: str,
    shift_folded: bool = False,
    shift_in_weight: bool = False,
    rotation: int = 1,
    block_size: int = 0,
    block_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    if granularity == "block" or rotation > 1:
        return NotImplemented
    fmt = by_name(format)
    values = x.to(torch.float32)
    if exponent_shift is not None and not shift_folded:
        values = values * power_of_two(-exponent_shift)
    if granularity == "token":
        operand_scale = scale_for_max(values.abs().amax(dim=-1, keepdim=True) * scale, fmt)
    else:
        operand_scale = scale.clone()
    rounded = _round_steps(values * operand_scale.reciprocal(), fmt)
    if exponent_shift is not None and not shift_in_weight:
        rounded = rounded * power_of_two(exponent_shift)
    return rounded.to(operand_dtype(format)), operand_scale


def _round_steps(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """As ``numerics.round_steps``, which saves memory by mutating what it made."""
    bound = float(fmt.max_integer)
    # clamp keeps NaN; no code holds it, so it becomes 0.
    clipped = torch.where(steps.isnan(), 0.0, steps.clamp(-bound, bound))
    if fmt.mantissa_bits == 0:
        return _round_to_power_of_two(clipped)
    binade = (clipped.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    # float32 has no bits below one quantum here, so the adder rounds to nearest even.
    magic = (binade * 2.0**-fmt.mantissa_bits).clamp(min=1.0) * (1.5 * 2**23)
    return (clipped + magic) - magic


def _round_to_power_of_two(steps: Tensor) -> Tensor:
    magnitude = steps.abs()
    bits = magnitude.view(torch.int32)
    rounded = ((bits + 0x3FFFFF + ((bits >> 23) & 1)) & FLOAT32_EXPONENT).view(torch.float32)
    value = torch.where(magnitude < 1.0, (magnitude > 0.5).to(torch.float32), rounded)
    return torch.where(steps < 0, -value, value)
