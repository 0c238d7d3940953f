"""Lowering of fp4::attend to one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

from fp4compile.kernels import REFERENCE
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import record
from fp4compile.lowering.config import config
from fp4compile.lowering.problem import AttentionProblem
from fp4compile.lowering.targets.template import text

# Up to so many query rows per head, the kernel for few; the heads that share a key may be rows.
MAX_FEW_ROWS = 16

_OP = torch.ops.fp4.attend.default
_reference = inductor.eager_reference(_OP)


@inductor.register(_OP)
def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scale: float,
    causal: bool = False,
    rows_first: bool = False,
) -> Any:
    _, heads, rows, head = query.get_size()
    known = inductor.known_int(rows)
    few = not causal and known is not None and known <= MAX_FEW_ROWS
    problem = AttentionProblem(
        rows=known if few else None,
        head=inductor.static_int(head),
        dtype=query.get_dtype(),
        scale=scale,
        causal=causal,
        rows_first=rows_first,
        device=query.get_device().type,
    )
    reason = _declines(problem)
    if reason is not None:
        record(problem, REFERENCE, (reason,))
        return _reference(query, key, value, mask, scale, causal, rows_first)
    record(problem, "cpp")
    inputs = {"query": query, "key": key, "value": value}
    if mask is not None:
        inputs["mask"] = mask
    return inductor.one_kernel(
        "fp4_attend",
        "\n".join(map(text, ("attend_vectors", "attend" if few else "attend_rows"))),
        problem,
        {name: inductor.contiguous(node) for name, node in inputs.items()},
        strides=[rows * heads * head, head, heads * head, 1] if rows_first else None,
    )


def _declines(problem: AttentionProblem) -> str | None:
    if problem.device != "cpu":
        return f"the query is on {problem.device}"
    if config.cpu_target == REFERENCE:
        return "forced by config.cpu_target"
    if problem.rows is None and not pick_vec_isa():
        return "torch's kernel of many rows is faster without vector instructions"
    if (
        problem.rows is None
        and problem.dtype != torch.float32
        and torch.cpu._is_amx_tile_supported()
    ):
        return "torch's kernel of many rows multiplies 16 bits with AMX tiles"
    return None
