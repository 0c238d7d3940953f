"""torch.export of the model, and the quantizable sites found in its graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fp4compile.errors import TraceError

aten = torch.ops.aten

# position of (activation, weight) in the arguments of each op that a packed weight can serve,
# and whether the weight is [K, N]
LINEAR_OPS: dict[Any, tuple[int, int, bool]] = {
    aten.linear.default: (0, 1, False),
    aten.addmm.default: (1, 2, True),
    aten.matmul.default: (0, 1, True),
    aten.mm.default: (0, 1, True),
}
# Ops that hand their first argument on unchanged in an exported inference graph.
PASS_THROUGH = frozenset(
    {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.contiguous.default,
     aten.dropout.default, aten.detach.default, aten.alias.default}
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One weight ``[N, K]`` (``[K, N]`` when ``transposed``) and the nodes that use it.

    ``name`` is the parameter's fully qualified name; ``aliases`` are all names under which the
    model holds the same parameter. ``linears`` read the activation ``input``; ``lookups`` are
    embedding nodes. A tied head has both.
    """

    name: str
    aliases: tuple[str, ...]
    linears: tuple[fx.Node, ...]
    lookups: tuple[fx.Node, ...]
    input: fx.Node | None
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    """Sites that read the same activation: they share its scale and exponent shifts."""

    input: fx.Node
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Graph:
    """The exported module, its sites in order of execution, and every parameter of two or more
    dimensions that is not a site, with the reason.
    """

    module: fx.GraphModule
    input_spec: pytree.TreeSpec
    sites: tuple[Site, ...]
    skipped: Mapping[str, str]
    groups: tuple[Group, ...] = field(init=False)

    def __post_init__(self) -> None:
        by_input: dict[fx.Node, list[Site]] = {}
        for site in self.sites:
            if site.input is not None:
                by_input.setdefault(site.input, []).append(site)
        groups = tuple(Group(node, tuple(sites)) for node, sites in by_input.items())
        object.__setattr__(self, "groups", groups)


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Graph:
    """Export ``model`` with dynamic batch and sequence and find its sites.

    Args:
        args, kwargs: one example call; tensors must have a batch of at least 2.

    Raises:
        TraceError: torch.export refuses the model; the message carries its reason.
    """
    dynamic = pytree.tree_map(dynamic_shape, (tuple(args), dict(kwargs)))
    shapes: Any = dynamic[0] if not kwargs else dict(_names(model, args, dynamic[0]), **dynamic[1])
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch.export raises a dozen types; all mean the same to a user
        raise TraceError(
            f"torch.export could not trace {type(model).__name__}: {error}\n"
            "fp4compile needs a model whose forward exports; check it with "
            "torch.export.export(model, args, kwargs, strict=False)"
        ) from error
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _drop_assertions(module.graph)
    sites, skipped = _find_sites(module, model)
    return Graph(module, exported.call_spec.in_spec, sites, skipped)


def dynamic_shape(value: Any) -> Any:
    """Batch and sequence are dynamic; for images and features of 4 or more dims only the batch."""
    if not isinstance(value, Tensor):
        return None
    dims = value.dim() if value.dim() <= 2 else (2 if value.dim() == 3 else 1)
    return dict.fromkeys(range(dims), torch.export.Dim.AUTO)


def _names(model: nn.Module, args: Sequence[Any], shapes: Sequence[Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names[: len(args)], shapes, strict=True))


def _drop_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _find_sites(
    module: fx.GraphModule, model: nn.Module
) -> tuple[tuple[Site, ...], dict[str, str]]:
    identity = {
        name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    aliases: dict[int, list[str]] = {}
    for name, parameter_id in identity.items():
        aliases.setdefault(parameter_id, []).append(name)
    readers: dict[int, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if str(node.target) in identity:
            readers.setdefault(identity[str(node.target)], []).append(node)
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    sites, skipped = [], {}
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        names = tuple(aliases[id(parameter)])
        found = _site_of(names, readers.get(id(parameter), []))
        if isinstance(found, Site):
            sites.append(found)
        else:
            skipped[names[0]] = found
    sites.sort(key=lambda site: min(order[node] for node in site.linears + site.lookups))
    return tuple(sites), skipped


def _site_of(names: tuple[str, ...], readers: Sequence[fx.Node]) -> Site | str:
    """The site of one parameter, or the reason why it is none."""
    linears: list[fx.Node] = []
    lookups: list[fx.Node] = []
    inputs: set[Any] = set()
    transposed: set[bool] = set()
    for reader, flipped, user in _uses(readers):
        if user.target is aten.embedding.default and user.args[0] is reader and not flipped:
            lookups.append(user)
            continue
        if user.target not in LINEAR_OPS:
            return f"used by {user.target}, which has no FP4 form"
        x_position, weight_position, needs_kn = LINEAR_OPS[user.target]
        if user.args[weight_position] is not reader or user.args.count(reader) > 1:
            return f"used by {user.target} as something else than its weight"
        linears.append(user)
        inputs.add(user.args[x_position])
        transposed.add(needs_kn != flipped)
    if not linears and not lookups:
        return "not used by the exported forward"
    if len(inputs) > 1:
        return "one weight applied to several activations (layers that share it)"
    if len(transposed) > 1 or (lookups and True in transposed):
        return "used both as [N, K] and as [K, N]"
    site_input = next(iter(inputs), None)
    return Site(names[0], names, tuple(linears), tuple(lookups), site_input, True in transposed)


def _uses(readers: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, bool, fx.Node]]:
    """(weight node, whether it is the transpose of the parameter, user) of every use."""
    for reader in readers:
        for user in reader.users:
            if _is_transpose(user):
                yield from ((user, True, grand_user) for grand_user in user.users)
            else:
                yield reader, False, user


def _is_transpose(node: fx.Node) -> bool:
    if node.target in (aten.transpose.int, aten.permute.default):
        return sorted(pytree.tree_leaves(node.args[1:])) in ([0, 1], [-2, -1])
    return node.target in (aten.t.default, aten.numpy_T.default)


def bias_node(linear: fx.Node) -> Any:
    """The bias that a node of :data:`LINEAR_OPS` adds, or None."""
    if linear.target is aten.addmm.default:
        return linear.args[0]
    has_bias = linear.target is aten.linear.default and len(linear.args) > 2
    return linear.args[2] if has_bias else None
