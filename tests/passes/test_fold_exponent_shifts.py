"""Every fold is exact: the folded model computes the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from folds import both, decisions
from models import NormThenLinears, tiny_llama, tokens
from torch import nn

from bench.families import FAMILIES
from fp4compile.passes import Rewrite
from fp4compile.passes.fold_exponent_shifts import fold_exponent_shifts
from fp4compile.trace import trace


def layer_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return NormThenLinears()


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("build", "call", "folds"),
    [
        (layer_norm_model, ((torch.randn(3, 5, 32),), {}), {"norm.weight", "up.weight"}),
        (
            tiny_llama,
            ((), {"input_ids": tokens(), "use_cache": False}),
            {f"model.layers.{i}.{n}.weight" for i in (0, 1)
             for n in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm",
                       "mlp.up_proj")}
            | {"model.norm.weight"},
        ),
    ],
    ids=["layer_norm", "llama"],
)  # fmt: skip
def test_folded_and_unfolded_models_compute_the_same_bits(build, call, folds, dtype):
    args = tuple(arg.to(dtype) for arg in call[0])
    folded, with_fold, without = both(build, (args, call[1]), dtype)
    assert set(folded.folded) == folds
    assert torch.equal(with_fold, without)


# Last module names of the producers that take shifts.
THROUGH = {
    "BERT": {"value"},
    "GPT-2": {"ln_f", "ln_1", "ln_2", "c_attn"},
    "Phi-3": {
        "input_layernorm",
        "qkv_proj",
        "post_attention_layernorm",
        "gate_up_proj",
        "norm",
    },
    "Gemma 2": {
        "input_layernorm",
        "v_proj",
        "pre_feedforward_layernorm",
        "up_proj",
        "norm",
    },
    "Falcon": {"input_layernorm", "query_key_value", "ln_f"},
    "OPT": {
        "self_attn_layer_norm",
        "v_proj",
        "final_layer_norm",
        "fc1",
    },
    "GPT-NeoX": {
        "query_key_value",
        "final_layer_norm",
        "input_layernorm",
        "post_attention_layernorm",
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BERT", torch.float64),
        ("BERT", torch.bfloat16),
        ("GPT-2", torch.float32),
        ("Phi-3", torch.bfloat16),
        ("GPT-NeoX", torch.float32),
        ("Gemma 2", torch.float64),
        ("Gemma 2", torch.bfloat16),
        ("Falcon", torch.float64),
        ("OPT", torch.float64),
    ],
    ids=str,
)
def test_folds_through_attention_splits_and_views_keep_the_bits(name, dtype):
    family = FAMILIES[name]
    ids = family.batch(1)["input_ids"]
    call = ((), {"input_ids": ids} if name == "BERT" else {"input_ids": ids, "use_cache": False})

    def build() -> nn.Module:
        torch.manual_seed(0)
        return family.build()

    folded, with_fold, without = both(build, call, dtype)
    assert {producer.split(".")[-2] for producer in folded.folded} == THROUGH[name]
    assert torch.equal(with_fold, without)


class OnePlus(nn.Module):
    """A norm as Gemma writes it: its weight is stored less 1."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma)
        self.linear = nn.Linear(len(gamma), 24)

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.linear((normed * (1.0 + self.gamma.float())).type_as(x))


@pytest.mark.parametrize(
    ("gamma", "dtype", "folds"),
    [
        (torch.randn(32).round(decimals=0) / 4, torch.float32, True),
        # Of 8 significant bits, which float32 holds after the subtraction.
        (torch.randn(32).bfloat16(), torch.bfloat16, True),
        # Some of 24 bits are lost when 1 is taken off (1 + gamma) / 8.
        (torch.linspace(-0.9, 0.9, 32).add(1e-7), torch.float32, False),
    ],
    ids=["coarse", "bfloat16", "fine"],
)
def test_a_norm_that_adds_one_to_its_weight_folds_where_that_is_exact(gamma, dtype, folds):
    torch.manual_seed(1)
    state = nn.Linear(32, 24).state_dict()

    def build() -> nn.Module:
        model = OnePlus(gamma.clone())
        model.linear.load_state_dict(state)
        return model

    call = ((torch.randn(3, 7, 32, dtype=dtype),), {})
    folded, with_fold, without = both(build, call, dtype)
    assert set(folded.folded) == ({"gamma"} if folds else set())
    assert torch.equal(with_fold, without)


class GroupedQueries(nn.Module):
    """Two heads of queries share one of values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)
        self.v, self.o = nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 2, 8).transpose(1, 2)
        k, v = (
            each(x).view(batch, length, 1, 8).transpose(1, 2).expand(-1, 2, -1, -1)
            for each in (self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, 16))


@pytest.mark.parametrize("agree", [True, False])
def test_heads_that_share_values_fold_where_their_shifts_agree(agree):
    torch.manual_seed(0)
    model = GroupedQueries().eval()
    x = torch.randn(3, 6, 16)
    graph = trace(model, (x,), {})
    found = decisions(model, graph)
    shift = torch.arange(8, dtype=torch.int8) % 4
    shift = torch.cat((shift, shift if agree else shift.flip(0)))
    activation = replace(found["o.weight"].activation, exponent_shift=shift)
    found["o.weight"] = replace(found["o.weight"], activation=activation)
    rewrite = fold_exponent_shifts(Rewrite(model, graph, found))
    assert set(rewrite.folded) == ({"v.weight"} if agree else set())
    if agree:
        assert torch.equal(rewrite.row_shifts["v.weight"], shift[:8])
        assert torch.equal(rewrite.parameters["v.bias"] * 2.0 ** shift[:8], model.v.bias)


class FusedProjection(nn.Module):
    """``second`` reads a part that overlaps the first one if ``overlap``."""

    def __init__(self, overlap: bool) -> None:
        super().__init__()
        self.fused = nn.Linear(16, 32)
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)
        self.start = 8 if overlap else 16

    def forward(self, x):
        y = self.fused(x)
        # The residual keeps the second part's shifts from folding too.
        part = y[..., self.start : self.start + 16]
        return self.first(y[..., :16]) + self.second(part) + part.sum()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_part_of_a_projection_folds_only_if_nobody_else_reads_it(overlap):
    model = FusedProjection(overlap).eval()
    graph = trace(model, (torch.randn(3, 16),), {})
    rewrite = fold_exponent_shifts(Rewrite(model, graph, decisions(model, graph)))
    assert rewrite.folded == ({} if overlap else {"fused.weight": ("first.weight",)})


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
