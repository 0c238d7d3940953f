"""Lowering of fp4::grouped_linear: the targets' kernels, once for every expert's rows."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.kernels import REFERENCE, KernelChoice
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import choose, record
from fp4compile.lowering.ops.gemm import gemm_inputs, gemm_problem
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
    problem = gemm_problem(
        operand,
        operand_scale,
        block_scale,
        rows,
        weight_format,
        out_dtype,
        block_size,
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
    inputs = gemm_inputs(operand, operand_scale, packed_weight, weight_scale, block_scale)
    inputs["offsets"] = inductor.as_vector(offsets)
    return inductor.grouped_gemm(f"fp4_{target.name}", target.source(problem), problem, inputs)
