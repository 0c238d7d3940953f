"""How much memory calibration may add, and what it is spent on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import psutil
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fp4compile.batches import Batch
from fp4compile.calibrate import segments
from fp4compile.errors import MemoryLimitError
from fp4compile.progress import estimated_seconds
from fp4compile.qparams import FEWEST_TOKENS, SAMPLE_TOKENS, QuantSpec
from fp4compile.sensitivity import single_samples
from fp4compile.trace import Graph, Group, Site
from fp4compile.weights import ROWS

logger = logging.getLogger(__name__)

UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
DEFAULT_SHARE = 0.5

# Peak of a group's search in float32 copies of its sample, its weights, the rows of a weight that
# are searched at a time, and its second moment, and a fixed part (tables of candidate maxima).
# Measured as growth of the resident size over all methods (5, 2, 20 and 4 copies), rounded up.
SAMPLE_COPIES = 6
WEIGHT_COPIES = 3
ROW_COPIES = 24
MOMENT_COPIES = 4
FIXED_BYTES = 64 << 20
# Peak while batches are observed: the sample is copied when a batch joins it, and in a run of
# several processes the previous group's sample waits for its round to end.
OBSERVED_COPIES = 4
FLOAT32 = 4
MIB = 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: what calibration may add (``limit``), is expected to add (``peak``), and what of it
    batches may hold between segments (``hidden``; the rest goes to disk: ``spills``).
    """

    limit: int
    peak: int
    hidden: int
    spills: bool
    sample_tokens: int


def parse_size(size: int | str) -> int:
    """Bytes of ``"2GiB"``, ``"800 MB"`` or a plain number of bytes.

    Raises:
        MemoryLimitError: ``size`` is none of these, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", str(size).strip())
    unit = (found[2] or "") if found else ""
    value = int(float(found[1]) * UNITS[unit]) if found and unit in UNITS else 0
    if value <= 0:
        raise MemoryLimitError(
            f"max_memory={size!r} is no amount of memory; give bytes, or text "
            "like '2GiB' or '800MB'"
        )
    return value


def plan_memory(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Batch],
    spec: QuantSpec,
    max_memory: int | str | None = None,
    *,
    sequential: bool = False,
    gradients: bool = False,
    sample_tokens: int = SAMPLE_TOKENS,
    processes: int = 1,
) -> MemoryPlan:
    """Divide ``max_memory`` (default: half of the available RAM, shared by the ``processes`` of
    this machine) among a sample of at most ``sample_tokens``, search and hidden states.

    Raises:
        MemoryLimitError: not even the smallest sample fits; the message names what would do.
    """
    if max_memory is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        limit = int(psutil.virtual_memory().available * DEFAULT_SHARE) // here
    else:
        limit = parse_size(max_memory)
    sizes = [_size_of(model, group, graph, batches) for group in graph.groups]
    weights = {site.name: model.get_parameter(site.name).numel() for site in graph.sites}
    rows = max((_searched_rows(model, site) for site in graph.sites), default=0)
    between, within = _forward_bytes(graph, batches)
    fixed = sum(weights.values()) * spec.weight.bits // 8 if sequential else 0
    lookups = [weights[site.name] for site in graph.sites if site.lookups]
    largest = FLOAT32 * (WEIGHT_COPIES * max(lookups, default=0) + ROW_COPIES * rows)
    if gradients:
        largest = max(largest, _gradient_bytes(graph, batches))

    def needed(sample_tokens: int) -> int:
        search = max((size.search(sample_tokens) for size in sizes), default=0)
        observed = max((size.observed(sample_tokens) for size in sizes), default=0)
        return fixed + max(search, within + observed, largest)

    wanted = sample_tokens
    while sample_tokens > FEWEST_TOKENS and needed(sample_tokens) > limit:
        sample_tokens = max(sample_tokens // 2, FEWEST_TOKENS)
    least = needed(sample_tokens)
    if least > limit:
        raise MemoryLimitError(
            f"max_memory is {limit / MIB:.0f} MiB, but calibration needs more even with a sample "
            f"of {FEWEST_TOKENS} tokens; give max_memory='{ceil(least / MIB)}MiB' or more"
        )
    hidden = limit - least
    plan = MemoryPlan(limit, least + min(between, hidden), hidden, between > hidden, sample_tokens)
    seconds = estimated_seconds(
        (min(sample_tokens, size.tokens) * size.channels, size.weights) for size in sizes
    )
    tokens = max((size.tokens for size in sizes), default=0)
    _tell(plan, wanted, len(graph.groups), tokens, seconds / processes)
    return plan


def _tell(plan: MemoryPlan, wanted: int, groups: int, tokens: int, seconds: float) -> None:
    if plan.sample_tokens < min(wanted, tokens):
        logger.warning(
            "max_memory: the search gets a sample of %d tokens instead of %d, which costs some "
            "accuracy; give more memory to keep all",
            plan.sample_tokens,
            min(wanted, tokens),
        )
    logger.info(
        "calibration: %d groups of weights, %d tokens, of which %d decide; very roughly %.0f s on "
        "this machine; about %.0f MiB of at most %.0f MiB%s",
        groups,
        tokens,
        min(tokens, plan.sample_tokens),
        seconds,
        plan.peak / MIB,
        plan.limit / MIB,
        "; hidden states go to disk in part" if plan.spills else "",
    )


@dataclass(frozen=True)
class _GroupSize:
    """``tokens`` of K ``channels``; elements of the ``weights`` that read them, and of those of one
    weight that are searched at a time.
    """

    tokens: int
    channels: int
    weights: int
    rows: int
    tied: bool

    def search(self, sample_tokens: int) -> int:
        """Peak bytes of the group's search."""
        sample = min(sample_tokens, self.tokens) * self.channels
        weights = WEIGHT_COPIES * self.weights + ROW_COPIES * self.rows
        moments = MOMENT_COPIES * self.channels**2
        return FLOAT32 * (SAMPLE_COPIES * sample + weights + moments) + FIXED_BYTES

    def observed(self, sample_tokens: int) -> int:
        """Peak bytes while its input is observed."""
        sample = min(sample_tokens, self.tokens) * self.channels
        return FLOAT32 * (OBSERVED_COPIES * sample + (self.channels**2 if self.tied else 0))


def _size_of(model: nn.Module, group: Group, graph: Graph, batches: Sequence[Batch]) -> _GroupSize:
    channels = group.channels
    example = _elements(node.meta["val"] for node in group.inputs) // channels
    tokens = sum(round(example * share) for share in _shares(graph, batches))
    weights = sum(model.get_parameter(site.name).numel() for site in group.sites)
    rows = max(_searched_rows(model, site) for site in group.sites)
    tied = any(site.lookups for site in group.sites)
    return _GroupSize(tokens, channels, weights, rows, tied)


def _searched_rows(model: nn.Module, site: Site) -> int:
    """Elements of the rows of a weight that are searched at a time."""
    shape = model.get_parameter(site.name).shape
    if site.patch:
        return min(shape[0], ROWS) * prod(shape[1:])
    *_, rows, channels = (*shape[:-2], *reversed(shape[-2:])) if site.transposed else shape
    return min(rows, ROWS) * channels


def _forward_bytes(graph: Graph, batches: Sequence[Batch]) -> tuple[int, int]:
    """Bytes that all batches hold between two segments, and that one has within, at most."""
    alive: dict[fx.Node, int] = {}
    between = within = 0
    for segment in segments(graph, graph.groups):
        for node, dead in segment.steps:
            own = node.op not in ("get_attr", "placeholder")
            alive[node] = _bytes(node.meta.get("val")) if own else 0
            within = max(within, sum(alive.values()))
            for old in dead:
                del alive[old]
        for old in segment.dead:
            del alive[old]
        between = max(between, sum(alive.values()))
    shares = _shares(graph, batches)
    return round(between * sum(shares)), round(within * max(shares))


def _gradient_bytes(graph: Graph, batches: Sequence[Batch]) -> int:
    """What one sample holds at most when it is run back: every value, the outputs once more each
    as float32, probabilities and gradient.
    """
    own = [n for n in graph.module.graph.nodes if n.op not in ("get_attr", "placeholder", "output")]
    values = sum(_bytes(node.meta.get("val")) for node in own)
    (outputs,) = graph.module.graph.find_nodes(op="output")
    returned = sum(_bytes(node.meta.get("val")) for node in outputs.all_input_nodes)
    samples = [sample for batch in batches for sample in single_samples(graph, batch)]
    return round((values + 3 * returned) * max(_shares(graph, samples)))


def _shares(graph: Graph, batches: Sequence[Batch]) -> list[float]:
    """Size of every batch relative to the traced example."""
    inputs = graph.module.graph.find_nodes(op="placeholder")
    example = max(_elements([node.meta.get("val") for node in inputs]), 1)
    return [_elements(pytree.tree_leaves(batch)) / example for batch in batches]


def _elements(values: Iterable[Any]) -> int:
    return sum(_hint(value.numel()) for value in values if isinstance(value, Tensor))


def _bytes(value: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(_hint(leaf.numel()) * leaf.itemsize for leaf in leaves)


def _hint(size: int | torch.SymInt) -> int:
    """A traced size, as it was in the example; 0 for one that depends on data."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0
