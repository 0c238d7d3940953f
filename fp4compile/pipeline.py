"""Calibrates and searches: from a traced model and batches to a decision per site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from fp4compile.batches import Batch
from fp4compile.calibrate import OnGroup, run_calibration
from fp4compile.checkpoint import Checkpoint, fingerprint, open_checkpoint
from fp4compile.distributed import Processes, processes_of
from fp4compile.heads import is_head
from fp4compile.hidden_states import HiddenStates
from fp4compile.memory import MemoryPlan, plan_memory
from fp4compile.observers import watch
from fp4compile.passes.plan import oriented
from fp4compile.passes.producers import channel_ties
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.progress import Progress
from fp4compile.qparams import QuantSpec, SiteQParams, Statistics
from fp4compile.search import GroupProblem, SearchMethod, SearchOptions, by_method
from fp4compile.search.candidates import minmax_weight
from fp4compile.search.diagnosis import diagnosed
from fp4compile.search.experts import search_experts
from fp4compile.sensitivity import sensitivities
from fp4compile.trace import Graph, Group, Site
from fp4compile.weight_uses import WeightUse
from fp4compile.weights import dequantized

Replacements = dict[fx.Node, Callable[..., Tensor]]


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first group to the last."""

    model: nn.Module
    graph: Graph
    batches: Sequence[Batch]
    spec: QuantSpec
    method: SearchMethod
    search: SearchOptions
    memory: MemoryPlan
    checkpoint: Checkpoint
    processes: Processes

    @property
    def lookups(self) -> list[Site]:
        return [site for site in self.graph.sites if site.lookups]

    def calibrate(
        self,
        groups: Sequence[Group],
        on_group: OnGroup,
        on_start: Replacements | None = None,
        columns: Mapping[Group, Sequence[Tensor]] | None = None,
    ) -> None:
        """Bring this process's batches to ``groups``, as :func:`run_calibration` says."""
        folder = self.checkpoint.folder
        hidden = HiddenStates(
            self.memory.hidden, folder and folder / f"hidden-{self.processes.rank}"
        )
        run_calibration(
            self.graph,
            self.batches,
            on_group,
            on_start,
            groups=groups,
            hidden=hidden,
            columns=columns,
        )

    def sensitivities(self) -> Mapping[Group, Sequence[Tensor]]:
        """Those of this process's batches, where tokens count by gradient."""
        if self.search.token_weights != "gradient":
            return {}
        numbers = count(self.processes.rank, self.processes.size)
        return sensitivities(self.model, self.graph, zip(numbers, self.batches, strict=False))

    def statistics(
        self, inputs: Iterable[Tensor], owner: int, *, second_moment: bool = False
    ) -> Statistics | None:
        """What all processes saw of a group's input; None but in process ``owner``."""
        observer = watch(
            inputs,
            self.memory.sample_tokens,
            second_moment=second_moment,
            first=self.processes.rank,
            stride=self.processes.size,
        )
        self.processes.merge(observer, owner)
        return observer.value if self.processes.rank == owner else None

    def keep(self, key: str, decisions: Mapping[str, SiteQParams]) -> None:
        if self.processes.rank == 0:
            self.checkpoint.add(key, decisions)


def decide(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Batch],
    spec: QuantSpec,
    method: str,
    *,
    search: SearchOptions | None = None,
    sequential: bool = False,
    progress: bool = True,
    max_memory: int | str | None = None,
    calibration_dir: str | Path | None = None,
    process_group: Any = None,
) -> dict[str, SiteQParams]:
    """Run the batches through the graph; each group of sites is decided when they reach it.

    With ``sequential`` a decided group computes with its decision from then on, so later groups
    are calibrated on what the quantized network produces. Otherwise as many groups as there are
    processes are decided at a time, one by each.
    """
    search = search or SearchOptions()
    processes = processes_of(process_group)
    plan = plan_memory(
        model,
        graph,
        batches,
        spec,
        max_memory,
        sequential=sequential,
        gradients=search.token_weights == "gradient",
        sample_tokens=search.sample_tokens,
        processes=processes.size,
    )
    # The sample must fit every process.
    memory = replace(plan, sample_tokens=min(processes.gathered(plan.sample_tokens)))
    options = {
        "spec": spec,
        **{f"spec of {site.name}": site.spec for site in graph.sites if site.spec is not None},
        "method": method,
        "search": search,
        "sequential": sequential,
        "sample_tokens": memory.sample_tokens,
        "processes": processes.size,
    }
    this = fingerprint(model, [site.name for site in graph.sites], batches, options)
    processes.check_same(this)
    checkpoint = processes.from_first(
        lambda: open_checkpoint(None if calibration_dir is None else Path(calibration_dir), this)
    )
    part = processes.share(batches)
    run = _Run(model, graph, part, spec, by_method(method), search, memory, checkpoint, processes)
    decided = _decide_lookups_first(run) if sequential else {}
    _decide_groups(run, decided, sequential=sequential, progress=progress)
    return decided | _decide_lookups(run, [s for s in run.lookups if s.name not in decided], {})


def _decide_groups(
    run: _Run, decided: dict[str, SiteQParams], *, sequential: bool, progress: bool
) -> None:
    """Add the decisions for all groups to ``decided``."""
    on_start = _replacements(run.model, run.lookups, decided) if sequential else {}
    found = {group: run.checkpoint.found.get(_group_key(group)) for group in run.graph.groups}
    for group, decisions in found.items():
        if decisions is not None:
            decided.update(decisions)
            on_start |= _replacements(run.model, group.sites, decided) if sequential else {}
    todo = [group for group, decisions in found.items() if decisions is None]
    round_size = 1 if sequential else run.processes.size
    columns = run.sensitivities() if todo else {}
    waiting: list[Group] = []
    problems: dict[Group, Statistics] = {}

    def on_group(group: Group, inputs: Iterator[Tensor]) -> Replacements:
        bar.at(group.sites[0].name)
        statistics = run.statistics(inputs, owner=len(waiting))
        waiting.append(group)
        if statistics is not None:
            problems[group] = statistics.with_sensitivity() if group in columns else statistics
        return finish_round() if len(waiting) == round_size else {}

    def finish_round() -> Replacements:
        made = {
            _group_key(group): _decide_group(run, group, statistics, decided)
            for group, statistics in problems.items()
        }
        for decisions in run.processes.gathered(made):
            for key, sites in decisions.items():
                run.keep(key, sites)
                decided.update(sites)
        bar.advance(sum(map(cost, waiting)), len(waiting))
        done = [site for group in waiting for site in group.sites]
        waiting.clear()
        problems.clear()
        return _replacements(run.model, done, decided) if sequential else {}

    def cost(group: Group) -> int:
        return sum(run.model.get_parameter(site.name).numel() for site in group.sites)

    with Progress(sum(map(cost, todo)), len(todo), show=progress) as bar:
        run.calibrate(todo, on_group, on_start, columns)
        finish_round()


def _group_key(group: Group) -> str:
    # Overrides can make several groups of one input.
    return f"group-{group.inputs[0].name}-{group.sites[0].uses[0].node.name}"


def _decide_group(
    run: _Run, group: Group, statistics: Statistics, decided: Mapping[str, SiteQParams]
) -> dict[str, SiteQParams]:
    weights = {site.name: oriented(run.model, site) for site in group.sites}
    problem = GroupProblem(
        weights,
        statistics,
        group.sites[0].spec or run.spec,
        frozenset(site.name for site in group.sites if site.lookups),
        frozenset(s.name for s in group.sites if is_head(s, *weights[s.name].shape[-2:])),
        {site.name: decided[site.name].weight for site in group.sites if site.name in decided},
        run.search,
        channel_ties(run.model, run.graph, group) if run.search.tie_shifts else None,
    )
    if group.offsets is not None:
        return search_experts(run.method, problem)
    return diagnosed(problem, run.method.search_group(problem))


def _decide_lookups_first(run: _Run) -> dict[str, SiteQParams]:
    """Embeddings, before any group runs on their quantized rows. One that is tied to a head also
    weighs the head's error, for which the full-precision model is run once.
    """
    todo = [site for site in run.lookups if _lookup_key(site) not in run.checkpoint.found]
    tied = {site.name for site in todo if site.linears}
    moments: dict[str, Tensor] = {}

    def on_group(group: Group, inputs: Iterator[Tensor]) -> Replacements:
        statistics = run.statistics(inputs, owner=0, second_moment=True)
        if statistics is not None:
            moments.update({site.name: statistics.second_moment for site in group.sites})
        return {}

    heads = [group for group in run.graph.groups if any(s.name in tied for s in group.sites)]
    if heads:
        run.calibrate(heads, on_group)
    return _decide_lookups(run, run.lookups, moments)


def _decide_lookups(
    run: _Run, sites: Sequence[Site], moments: Mapping[str, Tensor]
) -> dict[str, SiteQParams]:
    """The first process decides for all."""
    decided: dict[str, SiteQParams] = {}
    for site in sites:
        found = run.checkpoint.found.get(_lookup_key(site))
        if found is None:
            decide_it = partial(_decide_lookup, run, site, moments.get(site.name))
            found = {site.name: run.processes.from_first(decide_it)}
            run.keep(_lookup_key(site), found)
        decided.update(found)
    return decided


def _lookup_key(site: Site) -> str:
    return f"lookup-{site.lookups[0].name}"


def _decide_lookup(run: _Run, site: Site, head_moment: Tensor | None) -> SiteQParams:
    spec = (site.spec or run.spec).embedding
    assert spec is not None  # embeddings are no sites otherwise
    weight = oriented(run.model, site)
    qparams = run.method.search_lookup(weight, spec, head_moment, run.search)
    minmax = minmax_weight(weight, spec)
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
            oriented(model, site),
            decided[site.name],
            model.get_parameter(site.name).dtype,
            patch=site.patch,
        )
        for node in site.lookups:
            found[node] = WeightUse(node, node, (0,)).call(weight)
        for use in site.uses:
            found[use.node] = use.call(weight)
    return found
