"""Inductor's privates that only the GPU lowerings touch: Triton templates and how one is chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor import lowering as inductor_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V

from fp4compile.lowering.config import config
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets.triton_gemm import Tile, TritonTarget


def architecture(device: torch.device | int) -> str:
    """``"sm_90"`` or ``"gfx942"``, of the device that is compiled for."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@SymbolicGridFn
def _grid(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


@SymbolicGridFn
def _split_grid(
    parts: Any, m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any
) -> tuple[Any, Any, Any]:
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), parts, 1)


@cache
def _template(name: str, source: str, grid: Any) -> TritonTemplate:
    # Inductor wants a name of its own for every text.
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return TritonTemplate(name=f"{name}_{digest}", grid=grid, source=source)


def gemm(
    target: TritonTarget,
    problem: GemmProblem,
    inputs: dict[str, Any],
    batch: Sequence[Any],
    siblings: Sequence[int] = (),
) -> Any:
    """IR node ``[*batch, N]`` computed by the kernel of ``target``.

    ``siblings``: rows of each weight where there are several; those inputs that the second has of
    its own are called ``packed_weight_1`` and so on.
    """
    rows = inputs["operand"].get_size()[0]
    expected_rows = int(V.graph.sizevars.optimization_hint(rows))
    target = target.for_rows(expected_rows)
    tile = target.tile(problem, expected_rows)
    device, size = inputs["operand"].get_device(), [rows, problem.N]
    if tile.split_k == 1:
        layout = ir.FixedLayout(device, problem.out_dtype, size)
        result = _call(target, problem, tile, inputs, layout, siblings)
    else:
        needed = ("operand", *_each("packed_weight", siblings), *target.reads(problem))
        matrices = {name: inputs[name] for name in needed}
        sum_dtype = torch.int32 if target.exact_sums(problem) else torch.float32
        layout = ir.FixedLayout(device, sum_dtype, [tile.split_k, *size])
        parts = _call(target, problem, tile, matrices, layout, siblings)
        result = _epilogue(problem, parts, inputs, siblings)
    return inductor_lowering.view(result, [*batch, problem.N])


def _each(name: str, siblings: Sequence[int]) -> list[str]:
    """The input ``name`` of every weight."""
    return [name, *(f"{name}_{i}" for i in range(1, len(siblings)))]


def _joined(name: str, inputs: dict[str, Any], siblings: Sequence[int]) -> Any:
    vectors = [ir.TensorBox.create(inputs[each]) for each in _each(name, siblings)]
    return inductor_lowering.pointwise_cat(vectors) if siblings else vectors[0]


def _epilogue(
    problem: GemmProblem, parts: Any, inputs: dict[str, Any], siblings: Sequence[int]
) -> Any:
    """The result ``[M, N]`` of partial sums ``[parts, M, N]``; fuses with what reads it."""
    total = inductor_lowering.sum_(parts, axis=[0], dtype=parts.get_dtype())
    y = inductor_lowering.to_dtype(total, torch.float32)
    if problem.operand_scale is not None:
        scale = ir.TensorBox.create(inputs["operand_scale"])
        y = inductor_lowering.mul(y, inductor_lowering.view(scale, [-1, 1]))
    y = inductor_lowering.mul(y, _joined("weight_scale", inputs, siblings))
    if problem.bias:
        bias = _joined("bias", inputs, siblings)
        y = inductor_lowering.add(y, inductor_lowering.to_dtype(bias, torch.float32))
    y = inductor_lowering.to_dtype(y, problem.out_dtype)
    # Else every reader would sum again.
    y.realize()
    return y


def _call(
    target: TritonTarget,
    problem: GemmProblem,
    tile: Tile,
    inputs: dict[str, Any],
    layout: ir.Layout,
    siblings: Sequence[int],
) -> Any:
    marker = json.dumps({"kernel": target.name, "problem": str(problem)})
    names = f"{{%- set INPUTS = {list(inputs)!r} %}}\n# fp4compile {marker}\n"
    grid = _grid if tile.split_k == 1 else _split_grid
    template = _template(f"fp4_{target.name}", names + target.source(problem, siblings), grid)
    choices: list[Any] = []
    declined = template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs.values()),
        layout=layout,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        SPLIT_K=tile.split_k,
        DECODE_PTX=config.gpu_assembly and torch.version.hip is None,
    )
    if declined is not None:
        raise declined
    chosen = autotune_select_algorithm(target.name, choices, list(inputs.values()), layout)
    # torch 2.12 and later return the choice beside the node.
    return chosen[0] if isinstance(chosen, tuple) else chosen
