"""Which channel of a producer each channel of a value is, through views, splits and attention.

The numbers of the channels are sent down the path by the graph's own operators, on the sizes of
the traced example; so heads that share keys and values, and fused projections, need no case of
their own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fp4compile.trace import PASS_THROUGH

aten = torch.ops.aten

# Hand on what they are given, in another shape, in part or several times.
VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
     aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
     aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default,
     aten.movedim.int, aten.repeat_interleave.self_int, aten.repeat.default, aten.index.Tensor}
)  # fmt: skip
_STRICT_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
# Give several parts; each getitem takes one.
SPLITS = frozenset(
    {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
)
# Where a factor of 2^-shift on the first argument is one on the result, bit for bit.
_HOMOGENEOUS = frozenset(
    {aten.relu.default, aten.leaky_relu.default, aten.abs.default, aten.neg.default,
     aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
)  # fmt: skip
# (node, position of the argument whose channels the result has)
ATTENTION = {
    aten.scaled_dot_product_attention.default: 2,
    aten.matmul.default: 1,
    aten.bmm.default: 1,
}
# In place of a channel's number, where a value is a sum over several channels.
_SEVERAL = -1


def next_on_path(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of ``node`` that a power of two per channel may come from, best first."""
    if node.target is aten.index.Tensor and _constant_index(node) is None:
        return ()
    if node.target in PASS_THROUGH | VIEWS | SPLITS | _HOMOGENEOUS | {operator.getitem}:
        return _nodes(node.args[:1])
    if node.target in ATTENTION:
        operands = _nodes(node.args[:2])
        matrices = all(operand.meta["val"].dim() > 1 for operand in operands)
        return _nodes([node.args[ATTENTION[node.target]]]) if matrices else ()
    if node.target is aten.einsum.default:
        return _einsum_operand(node)
    if node.target is aten.mul.Tensor:
        same = [
            argument
            for argument in _nodes(reversed(node.args))
            if argument.meta["val"].shape[-1:] == node.meta["val"].shape[-1:]
        ]
        return tuple(same)
    return ()


def _einsum_operand(node: fx.Node) -> tuple[fx.Node, ...]:
    """The one of two operands that has the last dimension of the result, as values have in an
    attention that is written so.
    """
    operands: Any = node.args[1]
    letters, result = _letters(node)
    plain = all(each.isalpha() and len(set(each)) == len(each) for each in (*letters, result))
    if not plain or len(letters) != 2:  # an ellipsis, a diagonal, a number as the result
        return ()
    having = [x for x, each in zip(operands, letters, strict=True) if result[-1] in each]
    return _nodes(having) if len(having) == 1 else ()


def _letters(node: fx.Node) -> tuple[list[str], str]:
    """The dimensions of the operands of an einsum, and of its result."""
    operands, _, result = str(node.args[0]).replace(" ", "").partition("->")
    return operands.split(","), result


def _nodes(arguments: Any) -> tuple[fx.Node, ...]:
    return tuple(argument for argument in arguments if isinstance(argument, fx.Node))


def channel_sources(path: Sequence[fx.Node]) -> Tensor | None:
    """int64 ``[K]``: the channel of ``path[0]`` that each channel of ``path[-1]`` carries; None if
    one carries several, or if another reader of the path gets one of them too.

    Args:
        path: nodes, each an argument of the next.
    """
    if not all(_has_hint(size) for node in path for size in _shape(node)):
        return None  # a size that depends on data
    shape = _hints(path[0].meta["val"].shape)
    value: Any = torch.arange(shape[-1]).expand(shape)
    values = [value]
    for node, before in zip(path[1:], path, strict=False):
        value = _sent(node, before, value)
        values.append(value)
    rows = value.reshape(-1, value.shape[-1])
    sources = rows[0]
    if not torch.equal(rows, sources.expand_as(rows)) or bool((sources == _SEVERAL).any()):
        return None
    alone = all(
        _reads_once(following, node) and _others_miss(node, following, held, sources)
        for node, following, held in zip(path, path[1:], values, strict=False)
    )
    return sources if alone else None


def _sent(node: fx.Node, before: fx.Node, value: Any) -> Any:
    """The channel numbers that ``node`` hands on of ``value``, what ``before`` carries."""
    shape = _hints(_shape(node))
    if node.target in ATTENTION:
        return _mixed(value, shape)
    if node.target is aten.einsum.default:
        return _mixed_by_einsum(node, before, value).expand(shape)
    if node.target is aten.mul.Tensor or node.target is aten.div.Tensor:
        return value.expand(shape)
    if node.target in PASS_THROUGH or node.target in _HOMOGENEOUS:
        return value
    if node.target is aten.index.Tensor:
        return aten.index.Tensor(value, _constant_index(node))
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda other: value if other is before else _hint_of(other)
    )
    # Strides are not those of the graph's values, and only views ask for them.
    target = aten.reshape.default if node.target in _STRICT_VIEWS else node.target
    assert callable(target)
    return target(*args, **kwargs)


def _mixed(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The channels of what every query gets, a mixture of the rows of ``value``."""
    first = value[..., :1, :]
    row = torch.where((value == first).all(dim=-2, keepdim=True), first, _SEVERAL)
    if row.dim() > 2 and 1 < row.shape[-3] < shape[-3]:  # enable_gqa
        row = row.repeat_interleave(shape[-3] // row.shape[-3], dim=-3)
    return row.expand(shape)


def _mixed_by_einsum(node: fx.Node, before: fx.Node, value: Tensor) -> Tensor:
    """As :func:`_mixed`, of a product in which ``before`` is an operand."""
    operands: Any = node.args[1]
    letters, result = _letters(node)
    own = letters[list(operands).index(before)]
    for dim, letter in enumerate(own):
        if letter not in result:
            first = value.narrow(dim, 0, 1)
            alike = (value == first).all(dim=dim, keepdim=True)
            value = torch.where(alike, first, _SEVERAL)
    value = value.squeeze([dim for dim, letter in enumerate(own) if letter not in result])
    kept = [letter for letter in own if letter in result]
    value = value.permute([kept.index(letter) for letter in result if letter in kept])
    for dim, letter in enumerate(result):
        value = value if letter in kept else value.unsqueeze(dim)
    return value


def _constant_index(node: fx.Node) -> list[Tensor | None] | None:
    """What ``node``, an index, takes, if it is written in the model's code."""
    indices: Any = node.args[1]
    found = [index and _constant(index) for index in indices]
    known = all(i is None or c is not None for i, c in zip(indices, found, strict=True))
    return found if known else None


def _constant(node: fx.Node) -> Tensor | None:
    """The value of a literal, which torch.export lifts out of the graph."""
    if node.target is not aten.lift_fresh_copy.default:
        return None
    (literal,) = node.all_input_nodes
    value: Tensor = operator.attrgetter(str(literal.target))(node.graph.owning_module)
    return value


def _reads_once(reader: fx.Node, node: fx.Node) -> bool:
    """Not as in ``y * y``, where a factor would count twice."""
    taken = pytree.tree_leaves((reader.args, reader.kwargs))
    return sum(other is node for other in taken) == 1


def _others_miss(node: fx.Node, following: fx.Node, value: Any, sources: Tensor) -> bool:
    """Whether every other reader of ``node`` takes none of the channels ``sources``."""
    for user in node.users:
        if user is following:
            continue
        if user.target is aten.index.Tensor and _constant_index(user) is None:
            return False
        if user.target in VIEWS or user.target is operator.getitem:
            taken = _sent(user, node, value)
        elif user.target in SPLITS:
            taken = value
        else:
            return False
        leaves = [leaf for leaf in pytree.tree_leaves(taken) if isinstance(leaf, Tensor)]
        if any(bool(torch.isin(leaf, sources).any()) for leaf in leaves):
            return False
    return True


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _has_hint(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or bool(size.node.has_hint())


def _hint_of(node: fx.Node) -> Any:
    """A traced size as it was in the example."""
    return _hint(node.meta["val"])


def _hints(shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_hint(size) for size in shape)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
