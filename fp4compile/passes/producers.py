"""Which norm or linear produces an activation, and may yield it times 2^-shift.

Between producer and activation may stand what a power of two per channel commutes with:
multiplications by something else (``silu(gate) * up`` before ``down``), ReLU, views and splits of a
fused projection, and attention, whose outputs have the channels of its values.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp4compile.passes.channel_paths import channel_sources, next_on_path
from fp4compile.trace import PASS_THROUGH, Graph, Group, Site, bias_node, parameter_name

aten = torch.ops.aten

# op -> positions of the per-channel parameters (gamma, beta) that scale its output
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}


@dataclass(frozen=True)
class Producer:
    """Per-channel parameters of a norm, to which the graph adds ``added``; or the site whose output
    it is, the channels ``sources`` int64 ``[K]`` of it that the activation has, and the name of its
    bias in ``parameters``.
    """

    parameters: tuple[str, ...] = ()
    added: float = 0.0
    site: Site | None = None
    sources: Tensor | None = None


@dataclass(frozen=True)
class _Search:
    model: nn.Module
    graph: Graph
    quantized: Container[str]


def find_producer(
    model: nn.Module, graph: Graph, group: Group, quantized: Container[str]
) -> Producer | str:
    """The producer of the group's input, or why there is none.

    Args:
        quantized: names of the sites that can take a shift.
    """
    readers = {node for site in group.sites for node in site.linears}
    if group.patch:
        return "convolutions read windows of the activation"
    if len(group.inputs) > 1:
        return "layers that share the weight read other activations"
    if set(group.inputs[0].users) != readers:
        return "others read the activation too"
    found = _walk(_Search(model, graph, quantized), group.inputs)
    return found or "no norm or linear produces it for this use alone"


def channel_ties(model: nn.Module, graph: Graph, group: Group) -> Tensor | None:
    """int64 ``[K]``: channels of the group's input with the same number come from one row of its
    producer (heads of queries that share a head of values); None if every row is one channel.
    """
    found = find_producer(model, graph, group, {site.name for site in graph.sites})
    if isinstance(found, str) or found.sources is None:
        return None
    rows, numbers = found.sources.unique(return_inverse=True)
    return numbers if len(rows) < len(numbers) else None


def _walk(search: _Search, path: tuple[fx.Node, ...]) -> Producer | None:
    """The producer at the start of ``path``, or one further up."""
    node = path[0]
    site = next((site for site in search.graph.sites if site.linears == (node,)), None)
    if site is not None and site.uses[0].rows is None:
        return _site_producer(search, site, path)
    if node.target in _NORMS or node.target is aten.mul.Tensor:
        found = _norm_producer(search, node)
        if found is not None:
            return found if _is_elementwise(path) else None
    for before in next_on_path(node):
        found = _walk(search, (before, *path))
        if found is not None:
            return found
    return None


def _site_producer(search: _Search, site: Site, path: tuple[fx.Node, ...]) -> Producer | None:
    bias = bias_node(*site.linears)
    name = _own_vector(search, bias)
    if site.lookups or site.patch or site.name not in search.quantized:
        return None
    if bias is not None and name is None:
        return None
    sources = channel_sources(path)
    return None if sources is None else Producer((name,) if name else (), 0.0, site, sources)


def _is_elementwise(path: tuple[fx.Node, ...]) -> bool:
    """Whether nobody else reads the path and channels stay where they are."""
    sources = channel_sources(path)
    return sources is not None and torch.equal(sources, torch.arange(len(sources)))


def _norm_producer(search: _Search, node: fx.Node) -> Producer | None:
    """The parameters of a norm, or a vector that ``node`` multiplies with."""
    if node.target in _NORMS:
        positions = [p for p in _NORMS[node.target] if p < len(node.args)]
        arguments = [node.args[p] for p in positions if node.args[p] is not None]
        names = [_own_vector(search, argument) for argument in arguments]
        found = tuple(name for name in names if name)
        return Producer(found) if names and len(found) == len(names) else None
    if node.args[0] is node.args[1]:
        return None  # a square, in which a factor counts twice
    for factor in node.args:
        name, added = _own_vector(search, factor), 0.0
        if name is None:
            name, added = _one_plus_vector(search, factor)
        if name is not None:
            return Producer((name,), added)
    return None


def _one_plus_vector(search: _Search, node: object) -> tuple[str | None, float]:
    """(name, number added) of a vector as Gemma's norms use it: ``1 + weight.float()``."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or len(node.users) != 1:
        return None, 0.0
    numbers = [value for value in node.args if isinstance(value, int | float)]
    vectors = [value for value in node.args if isinstance(value, fx.Node)]
    if len(numbers) != 1 or len(vectors) != 1 or node.meta["val"].dtype != torch.float32:
        return None, 0.0
    vector: Any = vectors[0]
    if vector.target in PASS_THROUGH and len(vector.users) == 1:
        vector = vector.args[0]
    return _own_vector(search, vector), float(numbers[0])


def _own_vector(search: _Search, node: object) -> str | None:
    """Name of the 1-D parameter that ``node`` reads, if nothing else reads it."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
        return None
    named = dict(search.model.named_parameters(remove_duplicate=False))
    name = parameter_name(node)
    parameter = named.get(name)
    if parameter is None or parameter.dim() != 1:
        return None
    return None if sum(other is parameter for other in named.values()) > 1 else name
