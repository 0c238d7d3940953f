"""Cut a captured graph into regions: one per repeated block, one for what lies between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile.program.capture import BLOCK


@dataclass(frozen=True)
class Region:
    """``graph`` computes ``outputs`` from ``inputs``, nodes of the captured graph. Regions of equal
    ``key`` compute the same of inputs of the same kind.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: str


def cut(graph: fx.Graph) -> list[Region]:
    """The regions of ``graph`` in the order in which they run."""
    sizes = _sizes(graph)
    skipped = sizes | set(graph.find_nodes(op="placeholder")) | set(graph.find_nodes(op="output"))
    nodes = [node for node in graph.nodes if node not in skipped]
    groups = groupby(nodes, lambda node: node.meta[BLOCK])
    return [_region(list(group), sizes) for _, group in groups]


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that compute a number from sizes of placeholders.

    They stand in whichever block asked for them first, which would make it unlike the others.
    """
    known = set(graph.find_nodes(op="placeholder"))
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        is_number = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if is_number and known.issuperset(node.all_input_nodes):
            sizes.add(node)
            known.add(node)
    return sizes


def _region(nodes: list[fx.Node], sizes: set[fx.Node]) -> Region:
    nodes = _with_sizes(nodes, sizes)
    inside = set(nodes)
    inputs = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside
    )
    outputs = tuple(
        node
        for node in nodes
        if node not in sizes and any(user not in inside for user in node.users)
    )
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(f"input_{len(copies)}")
        copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return Region(graph, tuple(inputs), outputs, _text(graph))


def _with_sizes(nodes: list[fx.Node], sizes: set[fx.Node]) -> list[fx.Node]:
    """Every region computes the sizes that it needs from its own inputs."""
    needed: dict[fx.Node, None] = {}

    def need(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in sizes and source not in needed:
                need(source)
                needed[source] = None

    for node in nodes:
        need(node)
    return [*needed, *nodes]


def _text(graph: fx.Graph) -> str:
    """All that decides what ``graph`` compiles to; names of nodes do not."""
    names = {node: f"%{number}" for number, node in enumerate(graph.nodes)}

    def line(node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"{names[node]} {_kind(node.meta['val'])}"
        arguments = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        return f"{names[node]} {node.op} {node.target} {arguments}"

    return "\n".join(map(line, graph.nodes))


def _kind(value: Any) -> str:
    """What a compiled graph may rely on of an input; symbols tell symbolic sizes apart."""
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
