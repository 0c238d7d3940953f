"""torch.export of the model, and the quantizable sites found in its graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fp4compile.errors import TraceError
from fp4compile.keyword_call import naming_keywords, parameter_name
from fp4compile.qparams import QuantSpec
from fp4compile.weight_uses import WeightUse, bias_node, swaps_last_two, weight_use

aten = torch.ops.aten

# Ops that hand their first argument on unchanged in an exported inference graph.
PASS_THROUGH = frozenset(
    {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.contiguous.default,
     aten.dropout.default, aten.detach.default, aten.alias.default, aten.type_as.default}
)  # fmt: skip

_SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default})


@dataclass(frozen=True)
class Site:
    """One weight and the nodes that use it: ``[N, K]`` (``[K, N]`` when ``transposed``), a stack of
    experts ``[E, N, K]`` (``[E, K, N]``) where ``offsets`` says whose the rows of the input are, or
    that of a convolution ``[N, C, *patch]`` whose windows tile its input.

    ``name`` is the parameter's fully qualified name; ``aliases`` are all names under which the
    model holds the same parameter. ``uses`` read the activations ``inputs``, several where layers
    share the weight; ``lookups`` are embedding nodes. A tied head has both. ``spec`` overrides
    that of the call.
    """

    name: str
    aliases: tuple[str, ...]
    uses: tuple[WeightUse, ...]
    lookups: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    transposed: bool = False
    offsets: fx.Node | None = None
    patch: tuple[int, ...] = ()
    spec: QuantSpec | None = None

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """The nodes that multiply with the weight."""
        return tuple(use.node for use in self.uses)


@dataclass(frozen=True)
class Group:
    """Sites that read the same activation in the same way: they share its scale and exponent
    shifts. Layers that share their weights have several activations, taken as one.
    """

    inputs: tuple[fx.Node, ...]
    sites: tuple[Site, ...]

    @property
    def offsets(self) -> fx.Node | None:
        """Where each expert's rows of the input end, if the sites are stacks of experts."""
        return self.sites[0].offsets

    @property
    def patch(self) -> tuple[int, ...]:
        """The window, if the sites are convolutions."""
        return self.sites[0].patch

    @property
    def channels(self) -> int:
        """K: what one row of a weight is multiplied with."""
        shape = self.inputs[0].meta["val"].shape
        return int(shape[1]) * prod(self.patch) if self.patch else int(shape[-1])


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
        together: dict[Any, list[Site]] = {}
        for site in self.sites:
            if site.inputs:
                key = (site.inputs, site.offsets, site.patch, site.spec)
                together.setdefault(key, []).append(site)
        groups = tuple(Group(key[0], tuple(sites)) for key, sites in together.items())
        object.__setattr__(self, "groups", groups)


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Graph:
    """Export ``model`` with dynamic batch and sequence and find its sites.

    Args:
        args, kwargs: one example call; tensors must have a batch of at least 2.

    Raises:
        TraceError: torch.export refuses the model; the message carries its reason.
    """
    callee = naming_keywords(model, kwargs)
    call = inspect.signature(callee.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(dynamic_shape, dict(call))
    try:
        with torch.no_grad():
            exported = torch.export.export(
                callee, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False
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
        name = parameter_name(node)
        if name in identity:
            readers.setdefault(identity[name], []).append(node)
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    sites, skipped = [], {}
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        names = tuple(aliases[id(parameter)])
        found = _site_of(names, readers.get(id(parameter), []), order)
        if isinstance(found, Site):
            sites.append(found)
        else:
            skipped[names[0]] = found
    sites.sort(key=lambda site: min(order[node] for node in site.linears + site.lookups))
    return tuple(sites), skipped


def _site_of(
    names: tuple[str, ...], readers: Sequence[fx.Node], order: Mapping[fx.Node, int]
) -> Site | str:
    """The site of one parameter, or the reason why it is none."""
    uses: list[WeightUse] = []
    lookups: list[fx.Node] = []
    transposed: set[bool] = set()
    for reader, rows, flipped, user in _uses(readers):
        looked_up = user.target is aten.embedding.default and user.args[0] is reader
        if looked_up and not flipped and rows is None:
            lookups.append(user)
            continue
        use = weight_use(user, reader)
        if isinstance(use, str):
            return use
        if rows is not None and (use.offsets or use.patch or use.transposed != flipped):
            return f"used by {user.target} in parts"
        uses.append(replace(use, rows=rows))
        transposed.add(use.transposed != flipped)
    if not uses and not lookups:
        return "not used by the exported forward"
    inputs = tuple(sorted({use.input for use in uses}, key=lambda node: order[node]))
    kinds = {(use.offsets, use.patch) for use in uses}
    if len(kinds) > 1:
        return "one weight used in several ways (by rows of experts, or by other windows)"
    if len(transposed) > 1 or (lookups and True in transposed):
        return "used both as [N, K] and as [K, N]"
    offsets, patch = next(iter(kinds), (None, ()))
    return Site(
        names[0],
        names,
        tuple(uses),
        tuple(lookups),
        inputs,
        True in transposed,
        offsets,
        patch,
    )


_Rows = tuple[int, int] | None


def _uses(
    readers: Sequence[fx.Node], rows: _Rows = None
) -> Iterator[tuple[fx.Node, _Rows, bool, fx.Node]]:
    """(weight node, its rows of the parameter, whether it is transposed, user) of every use of
    ``readers``, which hold ``rows`` of it.
    """
    for reader in readers:
        for user in reader.users:
            parts = _parts(user) if rows is None else []
            for part, rows_of_part in parts:
                yield from _uses([part], rows_of_part)
            if _is_transpose(user):
                yield from ((user, rows, True, grand_user) for grand_user in user.users)
            elif not parts:
                yield reader, rows, False, user


def _parts(node: fx.Node) -> list[tuple[fx.Node, tuple[int, int]]]:
    """Where ``node`` takes a matrix ``[N, K]`` apart by rows: the parts, and their rows of it."""
    whole = node.args[0] if node.args else None
    if not isinstance(whole, fx.Node) or node.target not in (*_SPLITS, aten.slice.Tensor):
        return []
    rows, columns = whole.meta["val"].shape if whole.meta["val"].dim() == 2 else (0, 0)
    value: Any = node.meta["val"]
    parts = [value] if isinstance(value, Tensor) else value
    if any(part.dim() != 2 or part.shape[1] != columns for part in parts):
        return []
    if isinstance(value, Tensor):
        options: Any = node.args[1:]
        start = _first_row(rows, *options)
        return [] if start is None else [(node, (start, start + len(value)))]
    ends = [0, *accumulate(len(part) for part in parts)]
    numbered: list[tuple[fx.Node, Any]] = [(item, item.args[1]) for item in node.users]
    return [(item, (ends[number], ends[number + 1])) for item, number in numbered]


def _first_row(
    rows: int, dim: int = 0, start: int | None = None, _end: int | None = None, step: int = 1
) -> int | None:
    """Where a slice begins; None if it is none of neighbouring rows."""
    return slice(start, None).indices(rows)[0] if dim == 0 and step == 1 else None


def _is_transpose(node: fx.Node) -> bool:
    """Whether the last two dimensions change places, and no others."""
    dims = node.meta["val"].dim() if isinstance(node.meta.get("val"), Tensor) else 0
    order: Any = node.args[1:]
    if node.target in (aten.transpose.int, aten.permute.default):
        return swaps_last_two(dims, *order)
    return node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default)


__all__ = ["Graph", "Group", "Site", "bias_node", "parameter_name", "trace"]
