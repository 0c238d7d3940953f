"""What the lowerings of fp4::linear, fp4::linears and fp4::grouped_linear ask targets and give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fp4compile.lowering import inductor, inductor_gpu
from fp4compile.lowering.problem import GemmProblem


def gemm_problem(
    operand: Any,
    operand_scale: Any,
    block_scale: Any,
    rows: int,
    weight_format: str,
    out_dtype: torch.dtype,
    block_size: Any,
    *,
    bias: bool = False,
    experts: int = 0,
    operand_format: str = "",
    operand_shift: Any = None,
    shift_block: Any = 0,
) -> GemmProblem:
    """The problem of ``operand`` times a weight of ``rows`` outputs; arguments as of the ops."""
    return GemmProblem(
        N=rows,
        K=inductor.static_int(operand.get_size()[-1]),
        weight_format=weight_format.lower(),
        operand_dtype=operand.get_dtype(),
        operand_scale=_granularity(operand_scale, block_scale),
        block_size=inductor.static_int(block_size),
        bias=bias,
        out_dtype=out_dtype,
        **place(operand.get_device()),
        experts=experts,
        operand_format=operand_format,
        shift_block=0 if operand_shift is None else max(1, inductor.static_int(shift_block)),
    )


def _granularity(operand_scale: Any, block_scale: Any) -> str | None:
    """What shares a scale of the operand."""
    if operand_scale is None:
        return None
    if not operand_scale.get_size():
        return "tensor"
    # Blocks as long as a row are the same as tokens.
    columns = inductor.static_int(operand_scale.get_size()[-1])
    return "token" if block_scale is None or columns == 1 else "block"


def place(device: torch.device) -> dict[str, Any]:
    """Where a GEMM runs, as :class:`GemmProblem` has it."""
    if device.type != "cuda":
        return {"device": device.type}
    return {"device": device.type, "architecture": inductor_gpu.architecture(device)}


def gemm_inputs(
    operand: Any, operand_scale: Any, packed_weight: Any, weight_scale: Any, block_scale: Any
) -> dict[str, Any]:
    """What every kernel of one weight, or of one stack of weights, reads."""
    inputs = {
        "operand": inductor.as_matrix(operand),
        "packed_weight": inductor.as_matrix(packed_weight),
        "weight_scale": inductor.as_vector(weight_scale),
    }
    if block_scale is not None:
        inputs["block_scale"] = inductor.as_matrix(block_scale)
    if operand_scale is not None:
        inputs["operand_scale"] = inductor.as_vector(operand_scale)
    return inputs


def operand_facts(wanted: Sequence[str], operand_outer: Any, operand_shift: Any) -> dict[str, Any]:
    """Those of the two that a GPU's kernel wants, as far as they are given."""
    given = {"operand_outer": operand_outer, "operand_shift": operand_shift}
    return {n: inductor.as_vector(given[n]) for n in wanted if given[n] is not None}
