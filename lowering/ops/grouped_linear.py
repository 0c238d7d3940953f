"""Lowering of fp4::grouped_linear: the targets' kernels, once for every expert's rows."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.kernels import REFERENCE, KernelChoice
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import choose, record
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import CPU_TARGETS

_OP = torch.ops.fp4.grouped_linear.default
_reference = inductor.eager_reference(_OP)


def choose_for_stack(problem: GemmProblem) -> tuple[Any, KernelChoice]:
    """As ``choose``, for a stack of experts."""
    if problem.device != "cpu":
        reason = "no target of this device has a kernel for stacks of experts"
        return None, record(problem, REFERENCE, [reason])
    return choose(problem, CPU_TARGETS)


def granularity_of(operand_scale: Any, block_scale: Any) -> str | None:
    """What shares a scale of the operand."""
    if operand_scale is None:
        return None
    if not operand_scale.get_size():
        return "tensor"
    # Blocks as long as a row are the same as tokens.
    columns = inductor.static_int(operand_scale.get_size()[-1])
    return "token" if block_scale is None or columns == 1 else "block"


@inductor.register(_OP)
def grouped_linear(
    operand: Any,
    operand_scale: Any,
    packed_weight: Any,
    weight_scale: Any,
    offsets: Any,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Any = None,
    block_size: int = 0,
) -> Any:
    experts, rows, _ = (inductor.static_int(size) for size in packed_weight.get_size())
    problem = GemmProblem(
        N=rows,
        K=inductor.static_int(operand.get_size()[-1]),
        weight_format=weight_format.lower(),
        operand_dtype=operand.get_dtype(),
        operand_scale=granularity_of(operand_scale, block_scale),
        block_size=inductor.static_int(block_size),
        bias=False,
        out_dtype=out_dtype,
        device=operand.get_device().type,
        experts=experts,
    )
    target, _ = choose_for_stack(problem)
    if target is None:
        return _reference(
            operand,
            operand_scale,
            packed_weight,
            weight_scale,
            offsets,
            weight_format,
            out_dtype,
            block_scale,
            block_size,
        )
    inputs = {
        "operand": inductor.as_matrix(operand),
        "packed_weight": inductor.as_matrix(packed_weight),
        "weight_scale": inductor.as_vector(weight_scale),
        "offsets": inductor.as_vector(offsets),
    }
    if block_scale is not None:
        inputs["block_scale"] = inductor.as_matrix(block_scale)
    if operand_scale is not None:
        inputs["operand_scale"] = inductor.as_vector(operand_scale)
    return inductor.grouped_gemm(f"fp4_{target.name}", target.source(problem), problem, inputs)
