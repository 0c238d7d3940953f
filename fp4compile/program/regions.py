"""Cut a captured graph into regions: one per repeated block, one for what lies between."""

from __future__ import annotations

from collections.abc import Sequence
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
    _hoist_sizes(graph)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return [_region(list(group)) for _, group in groupby(nodes, lambda node: node.meta[BLOCK])]


def _hoist_sizes(graph: fx.Graph) -> None:
    """Compute sizes first; the trace does so in whichever block asks first, unlike the others."""
    early = set(graph.find_nodes(op="placeholder"))
    last = max(early)  # nodes are ordered by their place in the graph
    for node in list(graph.nodes):
        is_size = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if is_size and node not in early and early.issuperset(node.all_input_nodes):
            node.meta[BLOCK] = None
            last.append(node)
            early.add(node)
            last = node


def _region(nodes: Sequence[fx.Node]) -> Region:
    inside = set(nodes)
    inputs = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside
    )
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(f"input_{len(copies)}")
        copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return Region(graph, tuple(inputs), outputs, _text(graph))


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
