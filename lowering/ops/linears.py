"""Lowering of fp4::linears: one kernel on GPUs, else a kernel of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fp4compile.lowering import inductor, inductor_gpu
from fp4compile.lowering.choice import choose
from fp4compile.lowering.ops.gemm import gemm_problem, operand_facts
from fp4compile.lowering.ops.linear import linear, warn_of_stale_cache
from fp4compile.lowering.targets import TritonTarget, targets_of


@inductor.register(torch.ops.fp4.linears.default)
def linears(
    operand: Any,
    operand_scale: Any,
    packed_weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    weight_format: str,
    out_dtype: torch.dtype,
    block_scales: Sequence[Any],
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Any = None,
    operand_shift: Any = None,
    shift_block: int = 0,
) -> list[Any]:
    warn_of_stale_cache()
    rows = [inductor.static_int(packed.get_size()[0]) for packed in packed_weights]
    problem = gemm_problem(
        operand,
        operand_scale,
        block_scales[0] if block_scales else None,
        sum(rows),
        weight_format,
        out_dtype,
        block_size,
        bias=bool(biases),
        operand_format=operand_format,
        operand_shift=operand_shift,
        shift_block=shift_block,
    )
    facts = (operand_format, operand_outer, operand_shift, shift_block)
    target, _ = choose(problem, targets_of(problem.device))
    if not isinstance(target, TritonTarget):
        return [
            linear(
                operand,
                operand_scale,
                packed,
                weight_scales[i],
                biases[i] if biases else None,
                weight_format,
                out_dtype,
                block_scales[i] if block_scales else None,
                block_size,
                *facts,
            )
            for i, packed in enumerate(packed_weights)
        ]
    inputs = {"operand": inductor.as_matrix(operand)}
    inputs |= _numbered("packed_weight", map(inductor.as_matrix, packed_weights))
    inputs |= _numbered("weight_scale", map(inductor.as_vector, weight_scales))
    inputs |= _numbered("block_scale", map(inductor.as_matrix, block_scales))
    inputs |= _numbered("bias", map(inductor.as_vector, biases))
    if operand_scale is not None:
        inputs["operand_scale"] = inductor.as_vector(operand_scale)
    inputs |= operand_facts(target.reads(problem), operand_outer, operand_shift)
    y = inductor_gpu.gemm(target, problem, inputs, operand.get_size()[:-1], rows)
    return inductor.split(y, rows)


def _numbered(name: str, nodes: Any) -> dict[str, Any]:
    return {name if i == 0 else f"{name}_{i}": node for i, node in enumerate(nodes)}
