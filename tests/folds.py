"""What the tests of folds share: decisions with random shifts, and models rewritten by them."""

from __future__ import annotations

import torch
from torch import nn

from bench.family_checks import first_output
from fp4compile.formats import by_name
from fp4compile.numerics import scale_for_max
from fp4compile.passes import PASSES, Rewrite
from fp4compile.passes.plan import commit, oriented
from fp4compile.passes.producers import channel_ties
from fp4compile.passes.swap_weights import swap_weights
from fp4compile.qparams import ActivationQParams, SiteQParams, WeightQParams
from fp4compile.trace import trace


def decisions(model: nn.Module, graph, scale: float = 0.2) -> dict[str, SiteQParams]:
    """Random shifts per group, the same where the producer's rows are shared; one scale for all."""
    torch.manual_seed(5)
    found = {}
    for group in graph.groups:
        channels = oriented(model, group.sites[0]).shape[1]
        shift = torch.randint(0, 4, (channels,), dtype=torch.int8)
        ties = channel_ties(model, graph, group)
        shift = shift if ties is None else shift[ties]
        activation = ActivationQParams("e2m1", "tensor", torch.tensor(scale), shift)
        for site in group.sites:
            weight = oriented(model, site)
            scales = scale_for_max(weight.abs().amax(dim=1), by_name("e2m1"))
            found[site.name] = SiteQParams(WeightQParams("e2m1", scales), activation, 0.0, 0.0)
    return found


def run(build, call, passes, dtype) -> tuple[Rewrite, torch.Tensor]:
    model = build().to(dtype).eval()
    graph = trace(model, *call)
    rewrite = Rewrite(model, graph, decisions(model, graph))
    for rewrite_pass in passes:
        rewrite = rewrite_pass(rewrite)
    commit(rewrite)
    with torch.no_grad():
        out = model(*call[0], **call[1])
    return rewrite, first_output(out)


def both(build, call, dtype=torch.float32) -> tuple[Rewrite, torch.Tensor, torch.Tensor]:
    """What was folded, and the outputs with and without folds."""
    rewrite, folded = run(build, call, PASSES, dtype)
    _, unfolded = run(build, call, (swap_weights,), dtype)
    return rewrite, folded, unfolded
