"""Lowering of fp4::grouped_linear: no target has a kernel yet, so it calls the eager op, loudly."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.kernels import REFERENCE, KernelChoice
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import record

_OP = torch.ops.fp4.grouped_linear.default
_reference = inductor.eager_reference(_OP)


@inductor.register(_OP)
def grouped_linear(operand: Any, operand_scale: Any, packed_weight: Any, *args: Any) -> Any:
    experts, rows, _ = (inductor.static_int(size) for size in packed_weight.get_size())
    grouped_kernel(experts, rows, inductor.static_int(operand.get_size()[-1]))
    return _reference(operand, operand_scale, packed_weight, *args)


def grouped_kernel(experts: int, rows: int, columns: int) -> KernelChoice:
    """What computes a stack of ``experts`` weights ``[rows, columns]``."""
    problem = f"grouped linear E={experts} N={rows} K={columns}"
    return record(problem, REFERENCE, ["no target has a kernel for stacks of experts"])
