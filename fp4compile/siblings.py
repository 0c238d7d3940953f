"""Linears that read one activation become one call: q, k and v; gate and up.

A rewrite of Dynamo's graph, before it is traced to operators: the activation is rounded once, and
a GPU computes one GEMM (``fp4::linears``). The weights stay where they are in memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from fp4compile import ops
from fp4compile.tensor import FP4Tensor

# What the weights of one activation must have in common.
_ACTIVATION = ("activation_scale", "exponent_shift", "channel_order")
_READS = (F.linear, "size", "dim", getattr)
# A kernel gets so many weights at most; each is a pointer and a comparison per column.
MOST = 4


def merge_siblings(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Merge the siblings of Dynamo's ``graph``, in place; returns it.

    Args:
        inputs: of the graph, its weights among them. Which weights share an activation is read from
            their values, which inference never changes.
    """
    values = dict(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True))
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=F.linear):
        key = _key(node, values)
        if key is not None:
            groups.setdefault(key, []).append(node)
    found = [nodes for nodes in groups.values() if _can_merge(nodes)]
    for nodes in found:
        _merge(nodes)
    if found:
        graph.graph.lint()
        graph.recompile()
    return graph


def linear_siblings(
    x: Tensor, weights: Sequence[FP4Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    """``x @ W^T + bias`` for weights of one activation; ``biases`` one each, or none."""
    first = weights[0]
    operand, operand_scale = first.operand_of(x)
    blocks = [weight.block_scale for weight in weights if weight.block_scale is not None]
    return ops.linears(
        operand,
        operand_scale,
        [weight.packed_weight for weight in weights],
        [weight.weight_scale for weight in weights],
        list(biases),
        first.weight_format,
        x.dtype,
        blocks,
        first.block_size,
        *first.operand_facts,
    )


def _key(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Equal for linears that can be one; None for one that stays alone."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else None
    value = values.get(weight) if isinstance(weight, fx.Node) else None
    if node.kwargs or not isinstance(value, FP4Tensor) or value.dim() != 2 or value.transposed:
        return None
    attributes = tuple(getattr(value, name) for name in FP4Tensor.ATTRIBUTES)
    numbers = tuple(_number(getattr(value, name)) for name in _ACTIVATION)
    kind = None
    if isinstance(bias, fx.Node):
        if bias not in values:
            return None  # what the graph computes may come after the first of the siblings
        kind = values[bias].dtype
    return (x, attributes, numbers, kind, value.device, value.dtype)


def _number(tensor: Tensor | None) -> Any:
    return None if tensor is None else tuple(tensor.flatten().tolist())


def _can_merge(linears: Sequence[fx.Node]) -> bool:
    weights = {node.args[1] for node in linears}
    return 1 < len(linears) == len(weights) <= MOST and _reads_only(linears)


def _reads_only(linears: Sequence[fx.Node]) -> bool:
    """Whether the activation is the same from the first to the last of ``linears``: Dynamo's graph
    may write in place.
    """
    x, node = linears[0].args[0], linears[0]
    while node is not linears[-1]:
        node = node.next
        used = x in node.all_input_nodes and node.target not in _READS
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if used or (name.endswith("_") and not name.endswith("__")):
            return False
    return True


def _merge(linears: Sequence[fx.Node]) -> None:
    first = linears[0]
    graph = first.graph
    weights = tuple(node.args[1] for node in linears)
    biases = tuple(node.args[2] for node in linears if len(node.args) > 2 and node.args[2])
    with graph.inserting_before(first):
        merged = graph.call_function(linear_siblings, (first.args[0], weights, biases))
        parts = [graph.call_function(operator.getitem, (merged, i)) for i in range(len(linears))]
    for node, part in zip(linears, parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
