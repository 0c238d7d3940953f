"""Sites are found by what the graph computes, not by module classes or names."""

from __future__ import annotations

import pytest
import torch
from models import MatrixProducts, tiny_llama, tokens
from torch import nn

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


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.linear = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = self.linear(self.conv(x))
        return self.linear(torch.relu(x))


def test_what_is_no_site_has_a_reason():
    graph = trace(Unusual(), (torch.randn(2, 4, 8),), {})
    assert not graph.sites
    assert "conv1d" in graph.skipped["conv.weight"]
    assert "several activations" in graph.skipped["linear.weight"]
    assert "not used" in graph.skipped["unused.weight"]


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_model_that_does_not_export_is_a_clear_error():
    with pytest.raises(TraceError, match="Untraceable"):
        trace(Untraceable(), (torch.randn(2, 2),), {})
