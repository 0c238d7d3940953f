"""Runs calibration batches through the traced graph, all batches one segment at a time.

Breadth first, every batch reaches a group of sites before any batch passes it. Hence one pass
over the network gives each group its statistics, only one group's statistics are ever held, and
a group may be calibrated on what the already quantized part of the network produces. Within a
segment the batches go one after the other, so only one of them has temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fp4compile.batches import Batch, token_mask
from fp4compile.errors import CalibrationDataError, NonFiniteError
from fp4compile.hidden_states import HiddenStates
from fp4compile.trace import Graph, Group
from fp4compile.weight_uses import patches

# For a group and its inputs (one tensor [tokens, K] per batch, to be read once): what to compute
# instead of some nodes from now on; empty to go on in full precision.
OnGroup = Callable[[Group, Iterator[Tensor]], Mapping[fx.Node, Callable[..., Tensor]]]


@dataclass(frozen=True)
class Segment:
    """The nodes up to what a group reads, each with the values that are dead after it; ``dead``
    are those that nobody needs once the group has read its input.
    """

    group: Group
    steps: tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]
    dead: tuple[fx.Node, ...] = ()


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
        self.token_mask = token_mask(batch)
        held = [*leaves, *graph.module.parameters(), *graph.module.buffers()]
        self._resident = {_storage(value) for value in held if isinstance(value, Tensor)}
        self._away: list[fx.Node] = []

    def step(self, node: fx.Node, replacement: Callable[..., Tensor] | None) -> None:
        if replacement is None:
            self.env[node] = self.run_node(node)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            self.env[node] = replacement(*args, **kwargs)

    def tokens(self, group: Group, column: Tensor | None) -> Tensor:
        """The group's inputs as ``[tokens, K]``, without the tokens that the mask pads. A last
        ``column`` has a number of each token, so that a sample keeps it: that one, or the expert.
        """
        values = [self.env[node] for node in group.inputs]
        if column is not None:
            values = [_with_column(x, column) for x in values]
        found = [self._tokens_of(group, value) for value in values]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tokens_of(self, group: Group, value: Tensor) -> Tensor:
        if group.patch:
            value = patches(value, group.patch)
        if group.offsets is not None:
            return _with_expert(value, self.env[group.offsets])
        mask = self.token_mask
        if mask is not None and value.shape[:2] == mask.shape:
            return value[mask]
        return value.reshape(-1, value.shape[-1])

    def release(self) -> list[Any]:
        """Give up the values that take memory which neither the model nor the batch holds."""
        self._away = [node for node, value in self.env.items() if self._takes_memory(value)]
        return [self.env.pop(node) for node in self._away]

    def restore(self, values: Sequence[Any]) -> None:
        """Take back what :meth:`release` gave up."""
        self.env.update(zip(self._away, values, strict=True))

    def _takes_memory(self, value: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        return any(_storage(tensor) not in self._resident for tensor in tensors)


def _with_expert(rows: Tensor, offsets: Tensor) -> Tensor:
    """float32 ``[S, K + 1]``: rows up to ``offsets[e]`` are those of expert e."""
    positions = torch.arange(len(rows), device=rows.device)
    expert = torch.searchsorted(offsets.to(positions.dtype), positions, right=True)
    return _with_column(rows, expert)


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """float32 ``[..., K + 1]``."""
    return torch.cat((x.to(torch.float32), column[..., None].to(torch.float32)), dim=-1)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def run_calibration(
    graph: Graph,
    batches: Sequence[Batch],
    on_group: OnGroup,
    on_start: Mapping[fx.Node, Callable[..., Tensor]] | None = None,
    *,
    groups: Sequence[Group] | None = None,
    hidden: HiddenStates | None = None,
    columns: Mapping[Group, Sequence[Tensor]] | None = None,
) -> None:
    """Call ``on_group`` for every one of ``groups`` (default: all) in order of execution.

    Args:
        on_start: replacements that hold from the start (what was decided before).
        columns: by group with one input, per batch: what is added to its channels as the last
            (shape of the input without channels).
        hidden: where the batches' values are kept between segments; default: all in memory.

    Raises:
        CalibrationDataError: a batch does not fit the traced forward.
        NonFiniteError: an input of a group holds NaN or infinity.
    """
    states = [_BatchState(graph, batch) for batch in batches]
    replacements = dict(on_start or {})
    with hidden or HiddenStates() as store:
        for segment in segments(graph, graph.groups if groups is None else groups):
            added = (columns or {}).get(segment.group, [None] * len(states))
            inputs = _inputs(segment, states, replacements, store, added)
            found = on_group(segment.group, inputs)
            for _ in inputs:
                pass  # whatever on_group left unread must still pass the segment
            replacements.update(found)


def _inputs(
    segment: Segment,
    states: Sequence[_BatchState],
    replacements: Mapping[fx.Node, Callable[..., Tensor]],
    hidden: HiddenStates,
    columns: Sequence[Tensor | None],
) -> Iterator[Tensor]:
    """Run one batch after the other through the segment, yielding its tokens at the end."""
    for index, state in enumerate(states):
        state.restore(hidden.take(index))
        for node, dead in segment.steps:
            state.step(node, replacements.get(node))
            for old in dead:
                del state.env[old]
        tokens = state.tokens(segment.group, columns[index])
        for old in segment.dead:
            del state.env[old]
        hidden.put(index, state.release())
        _check_finite(segment.group, index, tokens)
        yield tokens


def segments(graph: Graph, groups: Sequence[Group]) -> Iterator[Segment]:
    """The nodes that some group's input depends on, cut where each group has what it reads."""
    needed: set[fx.Node] = set()
    stack = [node for group in groups for node in _reads(group)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    # Placeholders consume the batch's leaves in order, so none may be left out.
    order = [
        node for node in graph.module.graph.nodes if node in needed or node.op == "placeholder"
    ]
    position = {node: index for index, node in enumerate(order)}
    last_use = {used: node for node in order for used in (*node.all_input_nodes, node)}
    pending: dict[fx.Node, list[Group]] = {}
    for group in groups:
        last = max(_reads(group), key=lambda node: position[node])
        pending.setdefault(last, []).append(group)
        for used in _reads(group):
            last_use[used] = max(last_use[used], last, key=lambda node: position[node])
    dead: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last_use.items():
        dead.setdefault(node, []).append(used)
    steps: list[tuple[fx.Node, tuple[fx.Node, ...]]] = []
    for node in order:
        done = tuple(dead.get(node, ()))
        if node not in pending:
            steps.append((node, done))
            continue
        steps.append((node, ()))
        *others, last_group = pending[node]
        for group in others:
            yield Segment(group, tuple(steps))
            steps = []
        yield Segment(last_group, tuple(steps), done)
        steps = []


def _reads(group: Group) -> tuple[fx.Node, ...]:
    return group.inputs if group.offsets is None else (*group.inputs, group.offsets)


def _check_finite(group: Group, index: int, x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"calibration batch {index} produces NaN or infinity in the input of "
            f"{group.sites[0].name}; check the batch and run the model in float32 or bfloat16"
        )
