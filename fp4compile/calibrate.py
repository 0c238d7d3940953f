"""Runs calibration batches through the traced graph, all batches one node at a time.

Breadth first, every batch reaches a group of sites before any batch passes it. Hence one pass
over the network gives each group its statistics, only one group's statistics are ever held, and
a group may be calibrated on what the already quantized part of the network produces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fp4compile.batches import Batch
from fp4compile.errors import CalibrationDataError, NonFiniteError
from fp4compile.trace import Graph, Group

# For a group and its inputs (one tensor [tokens, K] per batch): what to compute instead of some
# nodes from now on; empty to go on in full precision.
OnGroup = Callable[[Group, Sequence[Tensor]], Mapping[fx.Node, Callable[..., Tensor]]]


class _BatchState(fx.Interpreter):
    """One batch's values of the nodes that are still needed."""

    def __init__(self, graph: Graph, batch: Batch) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        leaves, spec = pytree.tree_flatten((tuple(batch[0]), dict(batch[1])))
        if spec != graph.input_spec:
            raise CalibrationDataError(
                f"a calibration batch has the structure {spec}, the first one had "
                f"{graph.input_spec}; give all batches the same arguments"
            )
        self.args_iter = iter(leaves)
        mask = batch[1].get("attention_mask")
        self.token_mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def step(self, node: fx.Node, replacement: Callable[..., Tensor] | None) -> None:
        if replacement is None:
            self.env[node] = self.run_node(node)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            self.env[node] = replacement(*args, **kwargs)

    def tokens(self, node: fx.Node) -> Tensor:
        """The node's value as ``[tokens, K]``, without the tokens that the mask pads."""
        value = self.env[node]
        mask = self.token_mask
        if mask is not None and value.shape[:2] == mask.shape:
            return value[mask]
        return value.reshape(-1, value.shape[-1])


def run_calibration(
    graph: Graph,
    batches: Sequence[Batch],
    on_group: OnGroup,
    on_start: Mapping[fx.Node, Callable[..., Tensor]] | None = None,
) -> None:
    """Call ``on_group`` for every group of ``graph`` in order of execution.

    Args:
        on_start: replacements that hold from the start (quantized embeddings).

    Raises:
        CalibrationDataError: a batch does not fit the traced forward.
        NonFiniteError: an input of a group holds NaN or infinity.
    """
    states = [_BatchState(graph, batch) for batch in batches]
    pending = {group.input: group for group in graph.groups}
    replacements = dict(on_start or {})
    for node, dead in _schedule(graph):
        for state in states:
            state.step(node, replacements.get(node))
        if node in pending:
            group = pending.pop(node)
            inputs = [state.tokens(node) for state in states]
            _check_finite(group, inputs)
            replacements.update(on_group(group, inputs))
        for state in states:
            for old in dead:
                del state.env[old]


def _schedule(graph: Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The nodes that some group's input depends on, each with the values dead after it."""
    needed: set[fx.Node] = set()
    stack = [group.input for group in graph.groups]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    # Placeholders consume the batch's leaves in order, so none may be left out.
    order = [
        node for node in graph.module.graph.nodes if node in needed or node.op == "placeholder"
    ]
    last_use = {used: node for node in order for used in (*node.all_input_nodes, node)}
    dead: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last_use.items():
        dead.setdefault(node, []).append(used)
    for node in order:
        yield node, dead.get(node, [])


def _check_finite(group: Group, inputs: Sequence[Tensor]) -> None:
    for index, x in enumerate(inputs):
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"calibration batch {index} produces NaN or infinity in the input of "
                f"{group.sites[0].name}; check the batch and run the model in float32 or bfloat16"
            )
