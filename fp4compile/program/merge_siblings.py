"""One GEMM for linears that read the same activation: q, k and v; gate and up.

Their activation is then quantized once. The merged weight takes the place of theirs in memory:
their parameters become views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile.program.capture import BLOCK, Capture

fp4, aten = torch.ops.fp4, torch.ops.aten
# Positions of the arguments of fp4::linear that have a row per output.
_ROWS = {"packed_weight": 2, "weight_scale": 3, "bias": 4, "block_scale": 7}


def merge_siblings(capture: Capture) -> None:
    """Rewrite ``capture.graph``; add the merged weights to its constants."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in capture.graph.find_nodes(op="call_function", target=fp4.linear.default):
        key = _key(capture, node)
        if key is not None:
            groups.setdefault(key, []).append(node)
    for linears in groups.values():
        if len(linears) > 1:
            _merge(capture, linears)


def _arguments(node: fx.Node) -> list[Any]:
    """All of fp4::linear's arguments, defaults too."""
    given = list(node.args)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return given + [argument.default_value for argument in schema[len(given) :]]


def _key(capture: Capture, node: fx.Node) -> Any:
    """Equal for linears that can be one; None for one that stays alone."""
    operand, scale, *weight_and_settings = _arguments(node)
    packed, weight_scale, bias, format_, dtype, block_scale, block_size = weight_and_settings[:7]
    tensors = [value for value in (packed, weight_scale, bias, block_scale) if value is not None]
    if any(value not in capture.constants for value in tensors):
        return None
    kinds = tuple(value.meta["val"].dtype for value in tensors)
    # One outer scale per tensor cannot be merged, unless it is the same.
    outer = None if block_scale is None else capture.constants[weight_scale].item()
    settings = (format_, dtype, block_size, kinds, bias is None, outer, node.meta[BLOCK])
    return (_source(capture, operand, scale), *settings)


def _source(capture: Capture, operand: fx.Node, scale: fx.Node | None) -> Any:
    """What an operand is made of: its activation and the values of the parameters."""
    quantize = operand.args[0] if operand.op == "call_function" and operand.args else None
    if (
        scale is None
        or not isinstance(quantize, fx.Node)
        or (quantize.target is not fp4.quantize_activation.default)
    ):
        return operand
    return tuple(_by_value(capture, argument) for argument in quantize.args)


def _by_value(capture: Capture, argument: Any) -> Any:
    constant = capture.constants.get(argument) if isinstance(argument, fx.Node) else None
    if constant is None:
        return argument
    return (constant.dtype, constant.shape, tuple(constant.flatten().tolist()))


def _merge(capture: Capture, linears: Sequence[fx.Node]) -> None:
    graph, first = capture.graph, linears[0]
    arguments = [_arguments(node) for node in linears]
    rows = [node.meta["val"].shape[-1] for node in linears]
    merged = list(arguments[0])
    for position in _ROWS.values():
        columns = [argument[position] for argument in arguments]
        per_row = position != _ROWS["weight_scale"] or merged[_ROWS["block_scale"]] is None
        if columns[0] is not None and per_row:
            merged[position] = _constant(capture, columns)
    with graph.inserting_before(first):
        result = graph.call_function(fp4.linear.default, tuple(merged))
        value = first.meta["val"]
        result.meta = {
            BLOCK: first.meta[BLOCK],
            "val": value.new_empty((*value.shape[:-1], sum(rows))),
        }
        start = 0
        for node, size in zip(linears, rows, strict=True):
            part = graph.call_function(aten.slice.Tensor, (result, -1, start, start + size))
            part.meta = {BLOCK: first.meta[BLOCK], "val": node.meta["val"]}
            node.replace_all_uses_with(part)
            graph.erase_node(node)
            _relax_views(part)
            start += size


def _relax_views(part: fx.Node) -> None:
    """A part of a row is not contiguous, which a view may need."""
    for user in part.users:
        if user.target in (aten.view.default, aten._unsafe_view.default):
            user.target = aten.reshape.default


def _constant(capture: Capture, nodes: Sequence[fx.Node]) -> fx.Node:
    tensors = [capture.constants[node] for node in nodes]
    merged = _side_by_side(tensors)
    if merged is None:
        merged = torch.cat(tensors)
        start = 0
        for tensor in tensors:
            # In place, so that the model's own parameter lets go of its memory.
            tensor.set_(merged[start : start + len(tensor)])  # type: ignore[call-overload]
            start += len(tensor)
    with capture.graph.inserting_before(next(iter(capture.graph.nodes))):
        node = capture.graph.placeholder(f"merged_{nodes[0].name}")
    node.meta = {"val": capture.fake_mode.from_tensor(merged, static_shapes=True), BLOCK: None}
    capture.constants[node] = merged
    owners = [capture.codes[part] for part in nodes if part in capture.codes]
    if owners:
        capture.codes[node] = frozenset().union(*owners)
    return node


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which these are the rows, where an earlier capture merged them."""
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    rows = sum(map(len, tensors))
    return first.as_strided((rows, *first.shape[1:]), first.stride())
