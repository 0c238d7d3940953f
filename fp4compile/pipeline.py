"""Calibrates and searches: from a traced model and batches to a decision per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from fp4compile.batches import Batch
from fp4compile.calibrate import run_calibration
from fp4compile.formats import by_name
from fp4compile.observers import observe
from fp4compile.passes.plan import oriented
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.qparams import QuantSpec, SiteQParams, WeightQParams
from fp4compile.search import GroupProblem, SearchMethod
from fp4compile.search.embedding import search_embedding
from fp4compile.search.fpq import MINMAX_FORMATS, dequantized
from fp4compile.search.weight import minmax_weight
from fp4compile.tensor import FP4Tensor
from fp4compile.trace import LINEAR_OPS, Graph, Group, Site


def decide(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Batch],
    spec: QuantSpec,
    search: SearchMethod,
    *,
    progress: bool = True,
) -> dict[str, SiteQParams]:
    """Run the batches through the graph; each group of sites is decided when they reach it, and
    computes with its decision from then on, so later groups see what they will see in use.
    """
    decided = _decide_lookups(model, graph, batches, spec)
    bar = tqdm(total=len(graph.groups), desc="calibrate", unit="group", disable=not progress)

    def on_group(group: Group, inputs: Sequence[Tensor]) -> dict[fx.Node, Callable[..., Tensor]]:
        bar.set_postfix_str(group.sites[0].name)
        sites = [site for site in group.sites if not site.lookups or site.name in decided]
        problem = GroupProblem(
            {site.name: oriented(model, site.name, site.transposed) for site in sites},
            observe(inputs),
            spec,
            {site.name: decided[site.name].weight for site in sites if site.name in decided},
        )
        decided.update(search(problem))
        bar.update()
        return _replacements(model, sites, decided)

    lookups = [site for site in graph.sites if site.lookups]
    with bar:
        run_calibration(graph, batches, on_group, _replacements(model, lookups, decided))
    return decided


def _decide_lookups(
    model: nn.Module, graph: Graph, batches: Sequence[Batch], spec: QuantSpec
) -> dict[str, SiteQParams]:
    """Embeddings come first, since every group runs on their quantized rows; one that is tied to
    a head also weighs the head's error, for which the full-precision model is run once.
    """
    lookups = [site for site in graph.sites if site.lookups]
    if spec.embedding is None or not lookups:
        return {}
    moments: dict[str, Tensor] = {}

    def observe_heads(group: Group, inputs: Sequence[Tensor]) -> dict[fx.Node, Callable[..., Tensor]]:
        for site in group.sites:
            if site.lookups:
                moments[site.name] = observe(inputs).second_moment
        return {}

    if any(site.linears for site in lookups):
        run_calibration(graph, batches, observe_heads)
    decided = {}
    for site in lookups:
        weight = oriented(model, site.name, site.transposed)
        qparams = search_embedding(weight, spec.embedding, moments.get(site.name))
        decided[site.name] = _embedding_decision(weight, qparams, spec)
    return decided


def _embedding_decision(weight: Tensor, qparams: WeightQParams, spec: QuantSpec) -> SiteQParams:
    assert spec.embedding is not None
    minmax = minmax_weight(weight, by_name(MINMAX_FORMATS[spec.embedding.bits]))
    error, base = (
        float((dequantized(weight, found) - weight).square().sum() / weight.square().sum())
        for found in (qparams, minmax)
    )
    return SiteQParams(qparams, None, error, base)


def _replacements(
    model: nn.Module, sites: Sequence[Site], decided: Mapping[str, SiteQParams]
) -> dict[fx.Node, Callable[..., Tensor]]:
    """What the nodes of decided sites compute from now on: the reference of what will run."""
    found: dict[fx.Node, Callable[..., Tensor]] = {}
    for site in sites:
        if site.name not in decided:
            continue
        weight = fp4_weight(
            oriented(model, site.name, site.transposed),
            decided[site.name],
            model.get_parameter(site.name).dtype,
        )  # [N, K]
        for node in site.lookups:
            found[node] = partial(_call_with, node, 0, weight)
        for node in site.linears:
            _, position, needs_kn = LINEAR_OPS[node.target]
            found[node] = partial(_call_with, node, position, weight.t() if needs_kn else weight)
    return found


def _call_with(node: fx.Node, position: int, weight: FP4Tensor, *args: Any, **kwargs: Any) -> Tensor:
    assert callable(node.target)
    result: Tensor = node.target(*args[:position], weight, *args[position + 1 :], **kwargs)
    return result
