"""fp4::quantize_activation in functional torch, so that Inductor fuses it with what produces x; on
a CPU blocks and rotation by a kernel of their own, one pass over each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4compile.formats import alternatives
from fp4compile.kernels import REFERENCE
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import record
from fp4compile.lowering.config import config
from fp4compile.lowering.ops.quantize_blocks import quantize_blocks, rotated
from fp4compile.lowering.ops.rounding import divide, round_steps, scale_for_max
from fp4compile.lowering.problem import ActivationProblem
from fp4compile.lowering.targets.template import text
from fp4compile.numerics import power_of_two
from fp4compile.operand import ordered
from fp4compile.ops.quantize_activation import operand_dtype

_OP = torch.ops.fp4.quantize_activation.default
_reference = inductor.eager_reference(_OP)
MAX_CHANNELS = 2**17


@inductor.register_as_aten(_OP)
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
    channel_order: Any = None,
) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu" and (granularity == "block" or rotation > 1):
        return NotImplemented
    if channel_order is not None:
        x = ordered(x, channel_order)
    values = x.to(torch.float32)
    if exponent_shift is not None and not shift_folded:
        values = values * power_of_two(-exponent_shift)
    if rotation > 1:
        values = rotated(values, rotation)
    formats = alternatives(format)
    if granularity == "block":
        clips = (1.0,) if block_clip == 1.0 else (1.0, block_clip)
        rounded, operand_scale = quantize_blocks(values, scale, formats, block_size, clips)
        return _shifted_back(rounded, exponent_shift, shift_in_weight, format), operand_scale
    (fmt,) = formats
    if granularity == "token":
        operand_scale = scale_for_max(values.abs().amax(dim=-1, keepdim=True) * scale, fmt)
    else:
        operand_scale = scale.clone()
    rounded = round_steps(values * divide(torch.ones_like(operand_scale), operand_scale), fmt)
    return _shifted_back(rounded, exponent_shift, shift_in_weight, format), operand_scale


def _shifted_back(
    rounded: Tensor, exponent_shift: Tensor | None, shift_in_weight: bool, format: str
) -> Tensor:
    if exponent_shift is not None and not shift_in_weight:
        rounded = rounded * power_of_two(exponent_shift)
    return rounded.to(operand_dtype(format))


@inductor.register(_OP)
def quantize_rows(
    x: Any,
    scale: Any,
    exponent_shift: Any,
    format: str,
    granularity: str,
    shift_folded: bool = False,
    shift_in_weight: bool = False,
    rotation: int = 1,
    block_size: int = 0,
    block_clip: float = 1.0,
    channel_order: Any = None,
) -> tuple[Any, Any]:
    problem = ActivationProblem(
        K=inductor.static_int(x.get_size()[-1]),
        dtype=x.get_dtype(),
        format=format.lower(),
        granularity=granularity,
        shifts=exponent_shift is not None and not shift_folded,
        shifts_back=exponent_shift is not None and not shift_in_weight,
        rotation=inductor.static_int(rotation),
        block_size=inductor.static_int(block_size),
        block_clip=block_clip,
    )
    reason = _declines(problem)
    if channel_order is not None:
        reason = "its channels are in another order"
    if reason is not None:
        record(problem, REFERENCE, (reason,))
        return _reference(
            x,
            scale,
            exponent_shift,
            format,
            granularity,
            shift_folded,
            shift_in_weight,
            rotation,
            block_size,
            block_clip,
            channel_order,
        )
    record(problem, "cpp")
    inputs = {"x": inductor.as_matrix(x), "scale": inductor.as_vector(scale)}
    if problem.shifts or problem.shifts_back:
        inputs["exponent_shift"] = inductor.as_vector(exponent_shift)
    return inductor.quantize_rows(
        "fp4_quantize_activation",
        text("quantize_activation"),
        problem,
        inputs,
        operand_dtype(format),
        batch=x.get_size()[:-1],
    )


def _declines(problem: ActivationProblem) -> str | None:
    if problem.K > MAX_CHANNELS:
        return f"a row of more than {MAX_CHANNELS} channels is too large for the stack"
    if config.cpu_target == REFERENCE:
        return "forced by config.cpu_target"
    return None
