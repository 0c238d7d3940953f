"""How a node of an exported graph uses a weight: as a matrix, a stack of experts, or patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightUse:
    """``node`` multiplies the activation ``input`` with a weight.

    ``path`` leads to the weight in the node's arguments: a position, or one within a list.
    ``transposed``: the weight's last two dimensions are ``[K, N]`` there. ``rows``: the part of a
    weight ``[N, K]`` that it uses, from one up to another; None for all. ``offsets`` (of a stack
    of experts ``[E, N, K]``): the node that holds where each expert's rows of the input end.
    ``patch``: the window of a convolution whose windows tile the input, so that it is a linear of
    ``[N, channels * prod(patch)]``.
    """

    node: fx.Node
    input: fx.Node
    path: tuple[int, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    offsets: fx.Node | None = None
    patch: tuple[int, ...] = ()

    def call(self, weight: Tensor) -> Callable[..., Tensor]:
        """What the node computes with another weight ``[N, K]``; takes the node's arguments."""
        used = weight if self.rows is None else weight[slice(*self.rows)]
        given = used.mT if self.transposed else used

        def called(*args: Any, **kwargs: Any) -> Tensor:
            assert callable(self.node.target)
            result: Tensor = self.node.target(*_with(args, self.path, given), **kwargs)
            return result

        return called


def _with(args: Any, path: tuple[int, ...], value: Any) -> list[Any]:
    changed = list(args)
    changed[path[0]] = _with(changed[path[0]], path[1:], value) if len(path) > 1 else value
    return changed


@dataclass(frozen=True)
class _Matrix:
    """An op with positions of (activation, weight); ``[K, N]`` where ``transposed``."""

    input: int
    weight: int
    transposed: bool

    def __call__(self, node: fx.Node, weight: fx.Node) -> WeightUse | str:
        if node.args[self.weight] is not weight or node.args.count(weight) > 1:
            return f"used by {node.target} as something else than its weight"
        if weight.meta["val"].dim() != 2:
            return f"used by {node.target} as a batch of matrices, one per head or position"
        used = _activation(node, self.input)
        return used or WeightUse(node, node.args[self.input], (self.weight,), self.transposed)  # type: ignore[arg-type]  # _activation checked it


def _activation(node: fx.Node, position: int) -> str | None:
    found = node.args[position]
    if isinstance(found, fx.Node) and found.op != "get_attr":
        return None
    return f"used by {node.target} with a constant, not with an activation"


def _addmm(node: fx.Node, weight: fx.Node) -> WeightUse | str:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return "used by addmm with beta or alpha other than 1"
    return _Matrix(1, 2, True)(node, weight)


def _grouped(node: fx.Node, weight: fx.Node) -> WeightUse | str:
    """``(input [S, K], weight [E, K, N], offsets [E])``: rows up to ``offsets[e]`` are e's."""
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    if node.args[1] is not weight or not isinstance(offsets, fx.Node):
        return f"used by {node.target} as something else than a stack of experts"
    value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    if value is None or value.dim() != 2 or weight.meta["val"].dim() != 3:
        return f"used by {node.target} on other than [rows, K] times [experts, K, N]"
    return WeightUse(node, node.args[0], (1,), True, offsets=offsets)  # type: ignore[arg-type]  # a node


def _convolution(node: fx.Node, weight: fx.Node) -> WeightUse | str:
    if node.args[1] is not weight:
        return f"used by {node.target} as something else than its weight"
    window = tuple(weight.meta["val"].shape[2:])
    options: Any = node.args[3:]
    named: Any = node.kwargs
    reason = convolution_reason(window, *options, **named)
    if reason is not None:
        return f"used by {node.target}: {reason}"
    return _activation(node, 0) or WeightUse(node, node.args[0], (1,), patch=window)  # type: ignore[arg-type]  # _activation checked it


def convolution_reason(
    window: tuple[int, ...],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str | None:
    """Why a convolution is no linear of its windows; None if it is one."""
    if _tuple(stride, window) != window:
        return f"windows {window} that overlap or leave gaps (stride {stride}) are no plain linear"
    if padding != "valid" and any(_tuple(padding, window)):
        return f"a convolution with padding {padding} is no plain linear"
    if any(step != 1 for step in _tuple(dilation, window)) or groups != 1:
        return f"a convolution with dilation {dilation} and {groups} groups is no plain linear"
    return None


def _tuple(value: Any, window: tuple[int, ...]) -> tuple[Any, ...]:
    """``value`` for every dimension; a list of one stands for all."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * len(window) if len(values) == 1 else values


def _einsum(node: fx.Node, weight: fx.Node) -> WeightUse | str:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(operands, list | tuple)  # the op's schema
    transposed = einsum_transposed(str(equation)) if len(operands) == 2 else None
    x = operands[0]
    if transposed is None or operands[1] is not weight or not isinstance(x, fx.Node):
        return f"used by einsum {equation!r}, which is no product [..., K] x [N, K] or [K, N]"
    return WeightUse(node, x, (1, 1), transposed)


def einsum_transposed(equation: str) -> bool | None:
    """Whether ``equation`` is ``x [..., K]`` times ``[K, N]`` (True) or ``[N, K]`` (False) with
    result ``[..., N]``; None if it is neither.
    """
    sides = equation.replace(" ", "").split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2 or len(operands[1]) != 2:
        return None
    x, weight = operands
    for transposed, k, n in ((False, weight[1], weight[0]), (True, weight[0], weight[1])):
        if x.endswith(k) and n not in x and sides[1] == x[:-1] + n:
            return transposed
    return None


CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding,
    aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.conv3d.padding,
)  # fmt: skip
# By name: one of them exists only once transformers was imported.
GROUPED_OPS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
_OPS: dict[Any, Callable[[fx.Node, fx.Node], WeightUse | str]] = {
    aten.linear.default: _Matrix(0, 1, False),
    aten.addmm.default: _addmm,
    aten.matmul.default: _Matrix(0, 1, True),
    aten.mm.default: _Matrix(0, 1, True),
    aten.einsum.default: _einsum,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}


def weight_use(node: fx.Node, weight: fx.Node) -> WeightUse | str:
    """How ``node`` uses what ``weight`` holds, or why no packed weight can serve it."""
    describe = _OPS.get(node.target)
    if describe is None and is_grouped(node.target):
        describe = _grouped
    if describe is None:
        return f"used by {node.target}, which has no FP4 form"
    return describe(node, weight)


def is_grouped(target: Any) -> bool:
    """Whether an op multiplies rows with their expert's matrix."""
    return isinstance(target, torch._ops.OpOverload) and target.name() in GROUPED_OPS


def bias_node(node: fx.Node) -> Any:
    """The bias that a node of a weight adds, or None."""
    if node.target is aten.addmm.default:
        return node.args[0]
    has_bias = node.target is aten.linear.default or _OPS.get(node.target) is _convolution
    return node.args[2] if has_bias and len(node.args) > 2 else None


def swaps_last_two(dims: int, *order: Any) -> bool:
    """Whether ``transpose(*order)`` or ``permute(*order)`` swaps the last two of ``dims``."""
    if not order:
        return dims == 2
    if len(order) == 1:
        return [dim % dims for dim in order[0]] == [*range(dims - 2), dims - 1, dims - 2]
    return {dim % dims for dim in order} == {dims - 2, dims - 1}


def patches(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Windows that tile ``x`` ``[B, C, *sizes]``: ``[B, *counts, C * prod(window)]``; what does
    not fill a window is left out, as a convolution does.
    """
    dims = len(window)
    counts = [size // step for size, step in zip(x.shape[-dims:], window, strict=True)]
    for axis, (count, step) in enumerate(zip(counts, window, strict=True)):
        x = x.narrow(x.dim() - dims + axis, 0, count * step)
    split = [part for count, step in zip(counts, window, strict=True) for part in (count, step)]
    tiled = x.reshape(*x.shape[:2], *split)
    first = tiled.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return first.reshape(x.shape[0], *counts, x.shape[1] * prod(window))
