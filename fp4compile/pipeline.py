"""Calibrates and searches: from a traced model and batches to a decision per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from fp4compile.batches import Batch
from fp4compile.calibrate import run_calibration
from fp4compile.observers import observe
from fp4compile.passes.plan import oriented
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.qparams import QuantSpec, SiteQParams
from fp4compile.search import GroupProblem, SearchMethod, SearchOptions
from fp4compile.search.candidates import minmax_weight
from fp4compile.trace import LINEAR_OPS, Graph, Group, Site
from fp4compile.weights import dequantized

Replacements = dict[fx.Node, Callable[..., Tensor]]


def decide(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Batch],
    spec: QuantSpec,
    method: SearchMethod,
    *,
    options: SearchOptions | None = None,
    sequential: bool = False,
    progress: bool = True,
) -> dict[str, SiteQParams]:
    """Run the batches through the graph; each group of sites is decided when they reach it.

    With ``sequential`` a decided group computes with its decision from then on, so later groups
    are calibrated on what the quantized network produces.
    """
    options = options or SearchOptions()
    decided: dict[str, SiteQParams] = {}
    if sequential:
        decided = _decide_lookups_first(model, graph, batches, spec, method, options)
    bar = tqdm(total=len(graph.groups), desc="calibrate", unit="group", disable=not progress)

    def on_group(group: Group, inputs: Sequence[Tensor]) -> Replacements:
        bar.set_postfix_str(group.sites[0].name)
        problem = GroupProblem(
            {site.name: oriented(model, site.name, site.transposed) for site in group.sites},
            observe(inputs),
            spec,
            frozenset(site.name for site in group.sites if site.lookups),
            {site.name: decided[site.name].weight for site in group.sites if site.name in decided},
            options,
        )
        decided.update(method.search_group(problem))
        bar.update()
        return _replacements(model, group.sites, decided) if sequential else {}

    lookups = [site for site in graph.sites if site.lookups]
    with bar:
        at_start = _replacements(model, lookups, decided) if sequential else {}
        run_calibration(graph, batches, on_group, at_start)
    for site in lookups:
        if site.name not in decided:
            decided[site.name] = _decide_lookup(model, site, spec, method, options, None)
    return decided


def _decide_lookups_first(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Batch],
    spec: QuantSpec,
    method: SearchMethod,
    options: SearchOptions,
) -> dict[str, SiteQParams]:
    """Embeddings, before any group runs on their quantized rows. One that is tied to a head also
    weighs the head's error, for which the full-precision model is run once.
    """
    lookups = [site for site in graph.sites if site.lookups]
    moments: dict[str, Tensor] = {}

    def observe_heads(group: Group, inputs: Sequence[Tensor]) -> Replacements:
        for site in group.sites:
            if site.lookups:
                moments[site.name] = observe(inputs).second_moment
        return {}

    if any(site.linears for site in lookups):
        run_calibration(graph, batches, observe_heads)
    return {
        site.name: _decide_lookup(model, site, spec, method, options, moments.get(site.name))
        for site in lookups
    }


def _decide_lookup(
    model: nn.Module,
    site: Site,
    spec: QuantSpec,
    method: SearchMethod,
    options: SearchOptions,
    head_moment: Tensor | None,
) -> SiteQParams:
    assert spec.embedding is not None  # embeddings are no sites otherwise
    weight = oriented(model, site.name, site.transposed)
    qparams = method.search_lookup(weight, spec.embedding, head_moment, options)
    minmax = minmax_weight(weight, spec.embedding)
    error, base = (
        float((dequantized(weight, found) - weight).square().sum() / weight.square().sum())
        for found in (qparams, minmax)
    )
    return SiteQParams(qparams, None, error, base)


def _replacements(
    model: nn.Module, sites: Sequence[Site], decided: Mapping[str, SiteQParams]
) -> Replacements:
    """What the nodes of decided sites compute from now on: the reference of what will run."""
    found: Replacements = {}
    for site in sites:
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


def _call_with(node: fx.Node, position: int, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    assert callable(node.target)
    result: Tensor = node.target(*args[:position], weight, *args[position + 1 :], **kwargs)
    return result
