"""Lowering of fp4::linear: ask the targets, else call the eager op."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.kernels import KernelChoice
from fp4compile.lowering import inductor, inductor_gpu
from fp4compile.lowering.choice import choose, log
from fp4compile.lowering.ops.gemm import gemm_inputs, gemm_problem, operand_facts, place
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import TritonTarget, targets_of
from fp4compile.ops.quantize_activation import operand_dtype
from fp4compile.tensor import FP4Tensor

_OP = torch.ops.fp4.linear.default
_reference = inductor.eager_reference(_OP)


@inductor.register(_OP)
def linear(
    operand: Any,
    operand_scale: Any,
    packed_weight: Any,
    weight_scale: Any,
    bias: Any,
    weight_format: str,
    out_dtype: torch.dtype,
    block_scale: Any = None,
    block_size: int = 0,
    operand_format: str = "",
    operand_outer: Any = None,
    operand_shift: Any = None,
    shift_block: int = 0,
) -> Any:
    problem = gemm_problem(
        operand,
        operand_scale,
        block_scale,
        inductor.static_int(packed_weight.get_size()[0]),
        weight_format,
        out_dtype,
        block_size,
        bias=bias is not None,
        operand_format=operand_format,
        operand_shift=operand_shift,
        shift_block=shift_block,
    )
    warn_of_stale_cache()
    target, _ = choose(problem, targets_of(problem.device))
    if target is None:
        return _reference(
            operand,
            operand_scale,
            packed_weight,
            weight_scale,
            bias,
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
    batch = operand.get_size()[:-1]
    if isinstance(target, TritonTarget):
        if bias is not None:
            inputs["bias"] = inductor.as_vector(bias)
        inputs |= operand_facts(target.reads(problem), operand_outer, operand_shift)
        return inductor_gpu.gemm(target, problem, inputs, batch)
    if bias is not None:
        inputs["bias"] = inductor.as_vector(inductor.to_dtype(bias, torch.float32))
    return inductor.gemm(f"fp4_{target.name}", target.source(problem), problem, inputs, batch)


def warn_of_stale_cache() -> None:
    """Where the user's own pass has replaced ours, Inductor's cache does not see our sources."""
    if not inductor.source_hash_installed():
        log.warning(
            "post_grad_custom_pre_pass was assigned after fp4compile.lowering was imported; "
            "Inductor's cache may serve kernels of another version of fp4compile"
        )


def kernel_for(weight: FP4Tensor, bias: bool) -> KernelChoice:
    """The kernel that compiling what uses ``weight`` will use on this machine."""
    *stack, rows, _ = weight.packed_weight.shape
    columns = weight.codes
    activation = weight.activation_format
    shares = None if activation is None else weight.granularity
    if shares == "block" and columns <= weight.block_size:
        shares = "token"
    problem = GemmProblem(
        N=rows,
        K=columns,
        weight_format=weight.weight_format,
        operand_dtype=weight.dtype if activation is None else operand_dtype(activation),
        operand_scale=shares,
        block_size=weight.block_size,
        bias=bias,
        out_dtype=weight.dtype,
        **place(weight.device),
        operand_format=activation or "",
        shift_block=weight.operand_shift_block,
        experts=stack[0] if stack else 0,
    )
    return choose(problem, targets_of(problem.device))[1]
