"""Lowering of fp4::grouped_linear: the targets' kernels, once for every expert's rows."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.lowering import inductor, inductor_gpu
from fp4compile.lowering.choice import choose
from fp4compile.lowering.ops.gemm import gemm_inputs, gemm_problem, operand_facts
from fp4compile.lowering.targets import TritonTarget, targets_of

_OP = torch.ops.fp4.grouped_linear.default
_reference = inductor.eager_reference(_OP)


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
    operand_format: str = "",
    operand_outer: Any = None,
    operand_shift: Any = None,
    shift_block: int = 0,
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
        operand_format=operand_format,
        operand_shift=operand_shift,
        shift_block=shift_block,
    )
    target, _ = choose(problem, targets_of(problem.device))
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
            operand_format,
            operand_outer,
            operand_shift,
            shift_block,
        )
    inputs = gemm_inputs(operand, operand_scale, packed_weight, weight_scale, block_scale)
    inputs["expert_ends"] = inductor.as_vector(offsets)
    if isinstance(target, TritonTarget):
        inputs |= operand_facts(target.reads(problem), operand_outer, operand_shift)
        return inductor_gpu.gemm(target, problem, inputs, operand.get_size()[:-1])
    return inductor.grouped_gemm(f"fp4_{target.name}", target.source(problem), problem, inputs)
