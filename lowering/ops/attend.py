"""Lowering of fp4::attend to one kernel."""

from __future__ import annotations

from typing import Any

import torch

from fp4compile.kernels import REFERENCE
from fp4compile.lowering import inductor
from fp4compile.lowering.choice import record
from fp4compile.lowering.config import config
from fp4compile.lowering.problem import AttentionProblem
from fp4compile.lowering.targets.template import text

_OP = torch.ops.fp4.attend.default
_reference = inductor.eager_reference(_OP)


@inductor.register(_OP)
def attend(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    problem = AttentionProblem(
        rows=inductor.static_int(query.get_size()[2]),
        head=inductor.static_int(query.get_size()[3]),
        dtype=query.get_dtype(),
        scale=scale,
        device=query.get_device().type,
    )
    reason = _declines(problem)
    if reason is not None:
        record(problem, REFERENCE, (reason,))
        return _reference(query, key, value, mask, scale)
    record(problem, "cpp")
    inputs = {"query": query, "key": key, "value": value}
    if mask is not None:
        inputs["mask"] = mask
    return inductor.one_kernel(
        "fp4_attend",
        text("attend"),
        problem,
        {name: inductor.contiguous(node) for name, node in inputs.items()},
    )


def _declines(problem: AttentionProblem) -> str | None:
    if problem.device != "cpu":
        return f"the query is on {problem.device}"
    if config.cpu_target == REFERENCE:
        return "forced by config.cpu_target"
    return None
