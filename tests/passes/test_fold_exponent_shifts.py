"""Every fold is exact: the folded model computes the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens
from torch import nn

from fp4compile.formats import by_name
from fp4compile.numerics import scale_for_max
from fp4compile.passes import PASSES, Rewrite
from fp4compile.passes.fold_exponent_shifts import fold_exponent_shifts
from fp4compile.passes.plan import commit, oriented
from fp4compile.passes.swap_weights import swap_weights
from fp4compile.qparams import ActivationQParams, SiteQParams, WeightQParams
from fp4compile.trace import trace


def decisions(model: nn.Module, graph, scale: float = 0.2) -> dict[str, SiteQParams]:
    """Random shifts per group, one scale for all."""
    torch.manual_seed(5)
    found = {}
    for group in graph.groups:
        channels = oriented(model, group.sites[0]).shape[1]
        shift = torch.randint(0, 4, (channels,), dtype=torch.int8)
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
    return rewrite, out if isinstance(out, torch.Tensor) else out.logits


def layer_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return NormThenLinears()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("build", "call", "folds"),
    [
        (layer_norm_model, ((torch.randn(3, 5, 32),), {}), {"norm.weight", "up.weight"}),
        (
            tiny_llama,
            ((), {"input_ids": tokens(), "use_cache": False}),
            {f"model.layers.{i}.{n}.weight" for i in (0, 1)
             for n in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")}
            | {"model.norm.weight"},
        ),
    ],
    ids=["layer_norm", "llama"],
)  # fmt: skip
def test_folded_and_unfolded_models_compute_the_same_bits(build, call, folds, dtype):
    args = tuple(arg.to(dtype) for arg in call[0])
    folded, with_fold = run(build, (args, call[1]), PASSES, dtype)
    _, without = run(build, (args, call[1]), (swap_weights,), dtype)
    assert set(folded.folded) == folds
    assert torch.equal(with_fold, without)


class SecondReader(nn.Module):
    """Someone else reads the norm's output, or the norm's weight: nothing may be folded."""

    def __init__(self, share_weight: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.other = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        if share_weight:
            self.other.weight = self.norm.weight

    def forward(self, x):
        y = self.norm(x)
        if self.other.weight is self.norm.weight:
            return self.linear(y) + self.other(x)
        return self.linear(y) + y


@pytest.mark.parametrize("share_weight", [False, True], ids=["output", "weight"])
def test_nothing_is_folded_into_what_others_read(share_weight):
    model = SecondReader(share_weight).eval()
    graph = trace(model, (torch.randn(2, 16),), {})
    rewrite = fold_exponent_shifts(Rewrite(model, graph, decisions(model, graph)))
    assert not rewrite.folded


def test_a_fold_that_would_round_is_not_made():
    model = layer_norm_model().to(torch.float16)
    with torch.no_grad():
        model.norm.weight.fill_(2.0**-24)  # the least float16: no room for a smaller exponent
    graph = trace(model, (torch.randn(2, 32, dtype=torch.float16),), {})
    rewrite = fold_exponent_shifts(Rewrite(model, graph, decisions(model, graph)))
    assert "norm.weight" not in rewrite.folded


def test_an_undecided_sibling_prevents_the_fold():
    model = layer_norm_model()
    graph = trace(model, (torch.randn(2, 32),), {})
    found = decisions(model, graph)
    del found["gate.weight"]
    rewrite = fold_exponent_shifts(Rewrite(model, graph, found))
    assert "norm.weight" not in rewrite.folded
    kept = replace(rewrite, folded={})
    assert kept.qparams["up.weight"].activation.shift_folded is False
