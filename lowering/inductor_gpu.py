"""Inductor's privates that only the GPU lowerings touch: Triton templates and how one is chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import sympy
import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor import lowering as inductor_lowering
from torch._inductor.codegen.triton_utils import is_unaligned_buffer_name
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.utils import get_gpu_shared_memory
from torch._inductor.virtualized import V

from fp4compile.lowering.config import config
from fp4compile.lowering.inductor import contiguous
from fp4compile.lowering.inductor_pointwise import converted_operand, decoded_weight
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets.triton_gemm import (
    ALIGNMENT,
    Tile,
    TritonTarget,
    candidates,
    float_type,
    row_class,
    rows_of_each,
)


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


@SymbolicGridFn
def _stack_grid(
    m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any, min: Any
) -> tuple[Any, Any, Any]:
    # Of every expert one tile may be partly empty, but none is without a row.
    tiles = min(m, cdiv(m, meta["BLOCK_M"]) + meta["EXPERTS"])
    return (tiles * cdiv(n, meta["BLOCK_N"]), 1, 1)


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
    expected_rows = rows_of_each(problem, _expected(rows))
    target = target.for_rows(problem, expected_rows)
    asked = str(problem)
    problem, inputs = _as_read(target, problem, inputs, siblings)
    tile = target.tile(problem, min(expected_rows, target.most_rows))
    device, size = inputs["operand"].get_device(), [rows, problem.N]
    if tile.split_k == 1:
        layout = ir.FixedLayout(device, problem.out_dtype, size)
        result = _call(target, problem, tile, inputs, layout, siblings, asked)
    else:
        needed = ("operand", *_each("packed_weight", siblings), *target.reads(problem))
        matrices = {name: inputs[name] for name in needed}
        sum_dtype = torch.int32 if target.exact_sums(problem) else torch.float32
        layout = ir.FixedLayout(device, sum_dtype, [tile.split_k, *size])
        parts = _call(target, problem, tile, matrices, layout, siblings, asked)
        result = _epilogue(problem, parts, inputs, siblings)
    return inductor_lowering.view(result, [*batch, problem.N])


def _expected(rows: Any) -> int:
    """The most rows of the class that ``rows`` is in; a guard compiles anew for another class."""
    # Of no class, and no guard, where a number depends on data.
    return row_class(lambda most: V.graph.sizevars.guard_or_false(sympy.Le(rows, most)))


def _as_read(
    target: TritonTarget, problem: GemmProblem, inputs: dict[str, Any], siblings: Sequence[int]
) -> tuple[GemmProblem, dict[str, Any]]:
    """The problem and the inputs as the kernel of ``target`` takes them."""
    wanted = target.operand(problem)
    if wanted is not None:
        problem, inputs = _with_operand(problem, inputs, *wanted)
    return problem, _with_decoded(problem, inputs, siblings) if target.decoded else inputs


def _with_operand(
    problem: GemmProblem, inputs: dict[str, Any], dtype: torch.dtype, factor: float
) -> tuple[GemmProblem, dict[str, Any]]:
    """An operand in ``dtype``, to which the scales of its blocks have gone but their outer one."""
    inputs = dict(inputs)
    blocks = problem.operand_scale == "block"
    if blocks and "operand_outer" not in inputs:
        # Nobody says that the scales are those of E4M3.
        dtype = torch.float32
    inputs["operand"] = converted_operand(problem, inputs, dtype, factor)
    problem = replace(problem, operand_dtype=dtype)
    if not blocks:
        return problem, inputs
    del inputs["operand_scale"]
    if "operand_outer" not in inputs:
        return replace(problem, operand_scale=None), inputs
    inputs["operand_scale"] = inputs.pop("operand_outer")
    return replace(problem, operand_scale="tensor"), inputs


def _with_decoded(
    problem: GemmProblem, inputs: dict[str, Any], siblings: Sequence[int]
) -> dict[str, Any]:
    """``decoded`` in place of packed weights and the scales of their blocks."""
    inputs = dict(inputs)
    weights = [
        decoded_weight(problem, inputs.pop(packed), inputs.pop(scale, None), float_type(problem))
        for packed, scale in zip(
            _each("packed_weight", siblings), _each("block_scale", siblings), strict=True
        )
    ]
    joined = inductor_lowering.pointwise_cat(weights) if siblings else weights[0]
    return {**inputs, "decoded": contiguous(joined)}


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


def _tiles(problem: GemmProblem, tile: Tile) -> list[Tile]:
    """``tile``; what the user wants measured beside it, where Inductor is asked to.

    Not for experts: Inductor measures on random inputs, which are no ends of experts' rows.
    """
    if problem.experts or not (inductor_config.max_autotune or inductor_config.max_autotune_gemm):
        return [tile]
    return candidates(tile, problem.operand_dtype.itemsize, get_gpu_shared_memory())


def _is_aligned(node: Any) -> bool:
    """Whether ``node`` begins at a multiple of :data:`ALIGNMENT`, as Inductor knows."""
    offset = node.get_layout().offset * node.get_dtype().itemsize
    known = V.graph.sizevars.statically_known_multiple_of(offset, ALIGNMENT)
    return known and not is_unaligned_buffer_name(node.get_name())


def _call(
    target: TritonTarget,
    problem: GemmProblem,
    tile: Tile,
    inputs: dict[str, Any],
    layout: ir.Layout,
    siblings: Sequence[int],
    asked: str,
) -> Any:
    marker = json.dumps({"kernel": target.name, "problem": asked})
    weights = _each("packed_weight", siblings)
    aligned = all(_is_aligned(inputs[name]) for name in weights if name in inputs)
    facts = {"INPUTS": list(inputs), "ALIGNED": weights[:1] if aligned else []}
    names = "".join(f"{{%- set {name} = {value!r} %}}" for name, value in facts.items())
    names += f"\n# fp4compile {marker}\n"
    grid = _stack_grid if problem.experts else _grid if tile.split_k == 1 else _split_grid
    template = _template(f"fp4_{target.name}", names + target.source(problem, siblings), grid)
    choices: list[Any] = []
    for each in _tiles(problem, tile):
        declined = template.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs.values()),
            layout=layout,
            num_stages=each.num_stages,
            num_warps=each.num_warps,
            BLOCK_M=each.block_m,
            BLOCK_N=each.block_n,
            BLOCK_K=each.block_k,
            GROUP_M=each.group_m,
            SPLIT_K=each.split_k,
            SLICES=each.slices,
            EXPERTS=problem.experts,
            DECODE_PTX=config.gpu_assembly and torch.version.hip is None,
        )
        if declined is not None:
            raise declined
    chosen = autotune_select_algorithm(target.name, choices, list(inputs.values()), layout)
    # torch 2.12 and later return the choice beside the node.
    return chosen[0] if isinstance(chosen, tuple) else chosen
