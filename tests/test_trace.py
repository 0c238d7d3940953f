"""Sites are found by what the graph computes, not by module classes or names."""

from __future__ import annotations

import pytest
import torch
from models import MatrixProducts, tiny_llama, tokens
from torch import nn

from fp4compile.calibrate import run_calibration
from fp4compile.errors import TraceError
from fp4compile.trace import trace


def test_llama_groups_siblings_and_ties_the_head():
    graph = trace(tiny_llama(), (), {"input_ids": tokens(), "use_cache": False})
    assert len(graph.sites) == 15
    assert not graph.skipped
    siblings = [[site.name.split(".")[-2] for site in group.sites] for group in graph.groups]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert siblings == [*layer, *layer, ["embed_tokens"]] or siblings == [
        ["embed_tokens"],
        *layer,
        *layer,
    ]
    tied = graph.sites[0]
    assert tied.aliases == ("model.embed_tokens.weight", "lm_head.weight")
    assert len(tied.linears) == len(tied.lookups) == 1


def test_batch_and_sequence_are_dynamic():
    graph = trace(tiny_llama(), (), {"input_ids": tokens(), "use_cache": False})
    for batch, length in ((1, 3), (5, 17)):
        out = graph.module(input_ids=tokens(batch, length), use_cache=False)
        logits = out.logits if hasattr(out, "logits") else out["logits"]
        assert logits.shape[:2] == (batch, length)


def test_addmm_and_matmul_weights_are_sites_in_both_orientations():
    graph = trace(MatrixProducts(), (torch.randn(4, 16),), {})
    assert {site.name: site.transposed for site in graph.sites} == {
        "kn": True,
        "nk": False,
        "right": True,
    }


class Parts(nn.Module):
    """Some rows of one weight for each of two activations, and a weight for both."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(12, 6))
        self.shared = nn.Linear(6, 6)

    def forward(self, x, y):
        first, rest = self.fused.split((4, 8))
        return self.shared(x) @ self.shared(y).mT + (x @ first.T).sum() + (y @ rest.T).sum()


def test_one_weight_may_serve_several_activations():
    graph = trace(Parts(), (torch.randn(2, 3, 6), torch.randn(2, 3, 6)), {})
    fused, shared = sorted(graph.sites, key=lambda site: site.name)
    assert [use.rows for use in fused.uses] == [(0, 4), (4, 12)]
    assert [use.rows for use in shared.uses] == [None, None]
    (group,) = graph.groups
    assert group.inputs == fused.inputs == shared.inputs
    assert [node.name for node in group.inputs] == ["x", "y"]
    seen = []
    batch = ((torch.full((2, 3, 6), 1.0), torch.full((2, 3, 6), 2.0)), {})
    with torch.no_grad():
        run_calibration(graph, [batch], lambda _, tokens: seen.extend(tokens) or {})
    assert [tokens[:, 0].tolist() for tokens in seen] == [[1.0] * 6 + [2.0] * 6]


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.conv(x)


def test_what_is_no_site_has_a_reason():
    graph = trace(Unusual(), (torch.randn(2, 4, 8),), {})
    assert not graph.sites
    assert "conv1d" in graph.skipped["conv.weight"]
    assert "not used" in graph.skipped["unused.weight"]


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_model_that_does_not_export_is_a_clear_error():
    with pytest.raises(TraceError, match="Untraceable"):
        trace(Untraceable(), (torch.randn(2, 2),), {})
